//! TAP interfaces: a network's way to the host.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use proto::error::{Error, ErrorReason};
use tonic::Code;

use super::link;
use super::nat;
use super::netlink::{self, Prefix};
use super::udev;
use crate::frame::Frame;
use crate::frame::header::{self, VnetHeader};
use crate::mac::MacAddr;

/// Longest name of an interface (IFNAMSIZ without the final zero byte).
pub const NAME_MAX: usize = 15;
const DEVICE: &str = "/dev/net/tun";

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        /// TUNSETIFF: attach to the interface named, making it if there is none.
        tunsetiff, libc::TUNSETIFF, libc::ifreq);
    nix::ioctl_write_int_bad!(
        /// TUNSETPERSIST: the interface stays when the last file descriptor is closed (1) or goes (0).
        tunsetpersist, libc::TUNSETPERSIST);
    nix::ioctl_write_int_bad!(
        /// TUNSETOFFLOAD: what we understand in frames that the kernel gives us (`TUN_F_*`).
        tunsetoffload, libc::TUNSETOFFLOAD);
    nix::ioctl_write_ptr_bad!(
        /// TUNSETVNETHDRSZ: length of the virtio_net_hdr in front of every frame, in bytes.
        tunsetvnethdrsz, libc::TUNSETVNETHDRSZ, libc::c_int);
}

/// An attached TAP interface. It is persistent: when this process dies, the interface keeps its name, MAC, addresses
/// and the routes through it, and [`Tap::open`] finds it again. [`Tap::remove`] ends it.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
    index: u32,
}

/// A name the kernel and every tool accept for an interface.
///
/// # Errors
/// Why it is none.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(format!("interface name {name:?} is not 1 to {NAME_MAX} characters long"));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.chars().all(plain) || name.starts_with(['.', '-']) {
        return Err(format!(
            "interface name {name:?} has characters other than letters, digits, '-', '_' and '.', or begins with '.' or '-'"
        ));
    }
    Ok(())
}

impl Tap {
    /// Makes the interface, or takes over one of that name which a card has left; makes it persistent.
    ///
    /// # Errors
    /// No TUN driver, no permission, the name belongs to an interface of another kind or to another process.
    pub fn open(name: &str) -> Result<Self, Error> {
        check_name(name).map_err(|e| Error::invalid_field("tap", e))?;
        let fd: OwnedFd = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|e| open_error(&e))?
            .into();
        attach(&fd, name).map_err(|e| attach_error(name, e))?;
        let tap = |e: Errno| host_error(name, "set up", &e.into());
        set_options(&fd).map_err(tap)?;
        let index = nix::net::if_::if_nametoindex(name).map_err(tap)?;
        Ok(Self { fd, name: name.to_owned(), index })
    }

    /// Sets the interface up, with its MTU, its MAC address if one is given, the host's addresses on it, and the link group
    /// that says whether it belongs to a network with NAT. May wait for udev.
    ///
    /// # Errors
    /// What the kernel refuses, e.g. an address without IPv6 in the kernel.
    pub fn configure(
        &self,
        mtu: u32,
        mac: Option<MacAddr>,
        addresses: &[Prefix],
        nat: bool,
    ) -> Result<(), Error> {
        if mac.is_some() && !udev::settle(self.index) {
            tracing::warn!(
                tap = self.name,
                "udev has not been done with it in time, and may change its MAC address"
            );
        }
        let group = if nat { nat::GROUP_NAT } else { nat::GROUP_PLAIN };
        netlink::set_up(self.index, mtu, group, mac)
            .map_err(|e| host_error(&self.name, &format!("set up with MTU {mtu}"), &e))?;
        for a in addresses {
            netlink::add_address(self.index, *a)
                .map_err(|e| host_error(&self.name, &format!("given the address {a}"), &e))?;
        }
        Ok(())
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes one frame, [`header::LEN`] bytes of vnet header first; the number of bytes read.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(&self.fd, buf)?)
    }

    /// Gives one frame to the host, its payload straight from the sender's memory.
    ///
    /// # Errors
    /// As [`link::Link::send`].
    pub fn send(&self, frame: &Frame<'_>) -> io::Result<()> {
        let header = VnetHeader { num_buffers: 0, ..VnetHeader::of(&frame.offloads) }.to_bytes();
        link::write(self.fd.as_fd(), &header, frame)
    }

    /// Deletes the interface.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn remove(&self) -> Result<(), Error> {
        // SAFETY: TUNSETPERSIST takes an integer and touches no memory of ours.
        unsafe { ioctl::tunsetpersist(self.fd.as_raw_fd(), 0) }
            .map_err(|e| host_error(&self.name, "made to go", &e.into()))?;
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn attach(fd: &OwnedFd, name: &str) -> Result<(), Errno> {
    // SAFETY: ifreq is plain data (a name and a union of integers and addresses), for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: names are at most NAME_MAX long.
    for (to, from) in request.ifr_name.iter_mut().take(NAME_MAX).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads (and writes back the name into) an ifreq; ours is valid and outlives the call. It is
    // written through a pointer made from `&mut`.
    unsafe { ioctl::tunsetiff(fd.as_raw_fd(), &raw mut request) }?;
    Ok(())
}

fn set_options(fd: &OwnedFd) -> Result<(), Errno> {
    let header = header::LEN as libc::c_int;
    let offloads = (libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6) as libc::c_int;
    // SAFETY: the first reads an int that outlives the call; the other two take integers and touch no memory of ours.
    unsafe {
        ioctl::tunsetvnethdrsz(fd.as_raw_fd(), &raw const header)?;
        ioctl::tunsetoffload(fd.as_raw_fd(), offloads)?;
        ioctl::tunsetpersist(fd.as_raw_fd(), 1)?;
    }
    Ok(())
}

fn open_error(e: &io::Error) -> Error {
    let (code, reason, remedy) = match e.kind() {
        io::ErrorKind::PermissionDenied => (
            Code::PermissionDenied,
            ErrorReason::PermissionDenied,
            "run the network card as its service (offload-net.service), or as root",
        ),
        _ => (Code::FailedPrecondition, ErrorReason::Host, "load the driver on the host: modprobe tun"),
    };
    Error::new(code, reason, format!("cannot open {DEVICE}: {e}"))
        .resource(DEVICE)
        .remedy(remedy)
        .with("errno", e.raw_os_error().unwrap_or(0).to_string())
}

fn attach_error(name: &str, e: Errno) -> Error {
    let (code, reason, what, remedy) = match e {
        Errno::EPERM | Errno::EACCES => (
            Code::PermissionDenied,
            ErrorReason::PermissionDenied,
            format!(
                "cannot make the TAP interface {name}: the network card lacks the capability CAP_NET_ADMIN"
            ),
            "start it as its service (offload-net.service), or with AmbientCapabilities=CAP_NET_ADMIN, or as root",
        ),
        Errno::EBUSY => (
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("TAP interface {name} is in use by another process"),
            "choose another name, or stop the other process",
        ),
        Errno::EINVAL => (
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("{name} is the name of an interface that is no TAP of ours"),
            "choose another name; `ip link` lists the ones taken",
        ),
        _ => return host_error(name, "made", &e.into()),
    };
    Error::new(code, reason, what).resource(name).remedy(remedy).with("errno", (e as i32).to_string())
}

fn host_error(name: &str, what: &str, e: &io::Error) -> Error {
    let errno = e.raw_os_error().unwrap_or(0);
    let error = match errno {
        libc::EPERM | libc::EACCES => return attach_error(name, Errno::EPERM),
        libc::EOPNOTSUPP | libc::EAFNOSUPPORT => Error::new(
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("TAP interface {name} cannot be {what}: {e}"),
        )
        .remedy("leave out IPv6 addresses, or enable IPv6 on the host"),
        _ => Error::new(
            Code::FailedPrecondition,
            ErrorReason::Host,
            format!("TAP interface {name} cannot be {what}: {e}"),
        ),
    };
    error.resource(name).with("errno", errno.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs root: a network namespace of this test process's own, gone with it.
    #[test]
    fn a_tap_outlives_its_card_and_goes_when_removed() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let addresses = ["10.88.0.1/24".parse().unwrap(), "fd00:88::1/64".parse().unwrap()];
        let exists = || nix::net::if_::if_nametoindex("ob-test0").ok();
        let index = {
            let tap = Tap::open("ob-test0").unwrap();
            tap.configure(1400, None, &addresses, false).unwrap();
            let busy = Tap::open("ob-test0").unwrap_err();
            assert!(busy.message().contains("in use by another process"), "{busy}");
            exists().unwrap()
        };
        // A card that was killed: the descriptor is closed, nothing else was done.
        assert_eq!(exists(), Some(index));
        let again = Tap::open("ob-test0").unwrap();
        again.configure(1400, None, &addresses, true).unwrap();
        assert_eq!(exists(), Some(index));
        std::net::UdpSocket::bind("10.88.0.1:0").unwrap();
        std::net::UdpSocket::bind("[fd00:88::1]:0").unwrap();
        again.remove().unwrap();
        drop(again);
        assert_eq!(exists(), None);

        let lo = Tap::open("lo").unwrap_err();
        assert!(lo.message().contains("no TAP of ours"), "{lo}");
    }

    #[test]
    fn names() {
        for good in ["ob0", "a", "tap-0_1.2", "fifteen-chars-x"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "tap%d", "sixteen-chars-xx", "-x", "ü"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
