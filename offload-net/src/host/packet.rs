//! An interface of the host's own as a network's uplink, by AF_PACKET (packet(7)): a physical one, or one end of a veth pair.
//!
//! What arrives at it comes here, too; the host's own stack goes on to see what is for the host, but guests and host do not
//! hear each other through it, as with a macvtap. The interface is neither made nor configured, only made to take frames for
//! all addresses (promiscuous) for as long as this process has the socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};
use proto::error::{Error, ErrorReason};
use tonic::Code;

use super::link;
use super::tap::check_name;
use crate::frame::Frame;
use crate::frame::header::{self, VnetHeader};

/// A vnet header as these sockets have it: without `num_buffers`.
const HEADER: usize = header::LEN - 2;
/// What may wait for us in the kernel, in bytes: some super-frames.
const RECEIVE_BYTES: libc::c_int = 4 << 20;
/// All protocols.
const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

mod ioctl {
    nix::ioctl_read_bad!(
        /// SIOCGIFMTU: the interface's MTU.
        siocgifmtu, libc::SIOCGIFMTU, libc::ifreq);
}

/// A socket that has all frames of an interface.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// For the interface of this name, which must carry packets of `mtu` bytes.
    ///
    /// # Errors
    /// No such interface, it is down, its MTU is less, or no permission.
    pub fn open(name: &str, mtu: u32) -> Result<Self, Error> {
        check_name(name).map_err(|e| Error::invalid_field("interface", e))?;
        let index = nix::net::if_::if_nametoindex(name).map_err(|e| refused(name, e))?;
        let fd = Self::socket(index).map_err(|e| refused(name, e))?;
        let has = interface_mtu(&fd, name).map_err(|e| refused(name, e))?;
        if has < mtu {
            let what = format!("interface {name} has an MTU of {has}, and the network one of {mtu}");
            return Err(Error::invalid_field("mtu", what)
                .resource(name)
                .remedy(format!("give the network --mtu {has}, or: ip link set {name} mtu {mtu}")));
        }
        Ok(Self { fd })
    }

    fn socket(index: u32) -> Result<OwnedFd, Errno> {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: a system call that touches no memory of ours; no protocol: nothing comes before it is bound.
        let fd = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: the descriptor is new, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        set(&fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1)?;
        set(&fd, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1)?;
        // Beyond net.core.rmem_max, which needs CAP_NET_ADMIN. Without it bursts are lost sooner, and that is all.
        let _ = set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BYTES);
        refuse_tagged(&fd)?;
        let all = libc::packet_mreq {
            mr_ifindex: index.cast_signed(),
            mr_type: libc::PACKET_MR_PROMISC as libc::c_ushort,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        set(&fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &all)?;
        // SAFETY: sockaddr_ll is plain data, for which all zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = ALL;
        address.sll_ifindex = index.cast_signed();
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is a sockaddr_ll of this length, which the call reads.
        Errno::result(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) })?;
        // That the interface is down is said here, and not by `bind`.
        let mut error: libc::c_int = 0;
        let mut length = size_of_val(&error) as libc::socklen_t;
        // SAFETY: the call writes an int of this length.
        Errno::result(unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ERROR,
                (&raw mut error).cast(),
                &raw mut length,
            )
        })?;
        if error == 0 { Ok(fd) } else { Err(Errno::from_raw(error)) }
    }

    /// Takes one frame, [`header::LEN`] bytes of vnet header first; the number of bytes read, 0 for a frame that is none of ours.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let Some((head, frame)) = buf.split_first_chunk_mut::<{ header::LEN }>() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let (head, count) = head.split_at_mut(HEADER);
        count.fill(0);
        let mut parts = [IoSliceMut::new(head), IoSliceMut::new(frame)];
        match recvmsg::<()>(self.fd.as_raw_fd(), &mut parts, None, MsgFlags::empty()) {
            // It is longer than any of ours: nobody here could take it.
            Ok(got) if got.flags.contains(MsgFlags::MSG_TRUNC) => Ok(0),
            Ok(got) => Ok(got.bytes + count.len()),
            // A super-frame of a kind that the header has no name for. The kernel has dropped it.
            Err(Errno::EINVAL) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// As [`link::Link::send`].
    pub fn send(&self, frame: &Frame<'_>) -> io::Result<()> {
        let header = VnetHeader { num_buffers: 0, ..VnetHeader::of(&frame.offloads) }.to_bytes();
        link::write(self.fd.as_fd(), header.get(..HEADER).unwrap_or_default(), frame)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn set<T>(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> Result<(), Errno> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is plain data of this length, which the call reads.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length) };
    Errno::result(result).map(drop)
}

/// Frames with a VLAN tag, which the kernel takes out of them, are of another network.
fn refuse_tagged(fd: &OwnedFd) -> Result<(), Errno> {
    const TAG_PRESENT: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_VLAN_TAG_PRESENT).cast_unsigned();
    let instruction = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, TAG_PRESENT),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, 0),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // The kernel copies the program.
    set(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}

fn interface_mtu(fd: &OwnedFd, name: &str) -> Result<u32, Errno> {
    // SAFETY: ifreq is plain data (a name and a union of integers and addresses), for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: the name has been checked.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: SIOCGIFMTU reads and writes an ifreq; ours is valid and outlives the call.
    unsafe { ioctl::siocgifmtu(fd.as_raw_fd(), &raw mut request) }?;
    // SAFETY: that is the union's field that SIOCGIFMTU has written.
    Ok(u32::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0))
}

fn refused(name: &str, e: Errno) -> Error {
    let (code, reason, what, remedy) = match e {
        Errno::EPERM | Errno::EACCES => (
            Code::PermissionDenied,
            ErrorReason::PermissionDenied,
            format!("cannot use interface {name}: the network card lacks the capability CAP_NET_RAW"),
            "start it as its service (offload-net.service), or with AmbientCapabilities=CAP_NET_RAW, or as root"
                .to_owned(),
        ),
        Errno::ENODEV | Errno::ENXIO => (
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("the host has no interface {name}"),
            "`ip link` lists those there are; with --tap the card makes one".to_owned(),
        ),
        Errno::ENETDOWN => (
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("interface {name} is down"),
            format!("set it up: ip link set {name} up"),
        ),
        Errno::EAFNOSUPPORT => (
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("cannot use interface {name}: no packet sockets here"),
            "load the driver on the host (modprobe af_packet), and let the card's service use AF_PACKET"
                .to_owned(),
        ),
        _ => (
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("cannot use interface {name}: {e}"),
            "see `ip link` for its state".to_owned(),
        ),
    };
    Error::new(code, reason, what).resource(name).remedy(remedy).with("errno", (e as i32).to_string())
}
