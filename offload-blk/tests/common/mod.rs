//! A card process, and a guest with a disk on it.
// Every test binary uses its own part of this.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use offload_blk::{HEADER_BYTES, SECTOR_BYTES};
use offload_card::memory::{MemoryTable, Region};
use offload_card::ring::FEATURES;
use offload_card::testing::{Buffer, DriverQueue, Front, TestGuest};
use proto::error::Error;
use proto::v1::card_client::CardClient;
use proto::v1::device_spec::Kind;
use proto::v1::storage_card_client::StorageCardClient;
use proto::v1::{
    BlockDeviceSpec, CardInfo, CreateDeviceRequest, DeleteDeviceRequest, Device, DeviceLimits, DeviceSpec,
    DeviceStats, GetCardStatsRequest, IdentifyRequest, ImageInfo, InspectImageRequest, ListDevicesRequest,
    SetLimitsRequest,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;
use vm_memory::{Bytes, GuestAddress};

pub const PATIENCE: Duration = Duration::from_secs(10);

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// Features of a modern driver: ring features, flush, several queues, cache mode.
pub const DRIVER: u64 = FEATURES | 1 << 9 | 1 << 12 | 1 << 2 | 1 << 6;

/// The process `offload-blk`, killed when dropped.
pub struct Card {
    /// `None`: somebody else's.
    child: Option<Child>,
    pid: u32,
    pub dir: PathBuf,
    arguments: Vec<String>,
}

impl Card {
    pub fn start(dir: &Path, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        let child = spawn(dir, &arguments);
        Self { pid: child.id(), child: Some(child), dir: dir.to_owned(), arguments }
    }

    /// One that the caller has started and ends.
    pub fn adopt(dir: &Path, pid: u32) -> Self {
        Self { child: None, pid, dir: dir.to_owned(), arguments: Vec::new() }
    }

    pub fn signal(&self, name: &str) {
        let pid = self.pid.to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    pub fn kill(&mut self) {
        let child = self.child.as_mut().expect("a child");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Kills it and starts its successor.
    pub fn crash(&mut self) {
        self.kill();
        self.restart();
    }

    pub fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        let since = Instant::now();
        loop {
            if let Some(status) = self.child.as_mut().expect("a child").try_wait().unwrap() {
                return status;
            }
            assert!(since.elapsed() < PATIENCE, "the card does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn restart(&mut self) {
        let child = spawn(&self.dir, &self.arguments);
        self.pid = child.id();
        self.child = Some(child);
    }

    /// Calls the card, which may still be starting.
    pub fn call<T>(&self, call: impl AsyncFn(Channel) -> Result<T, tonic::Status>) -> Result<T, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let socket = self.dir.join("control.sock");
        runtime.block_on(async {
            let since = Instant::now();
            let channel = loop {
                let socket = socket.clone();
                let connect = service_fn(move |_: Uri| {
                    let socket = socket.clone();
                    async move { UnixStream::connect(socket).await.map(TokioIo::new) }
                });
                match Endpoint::from_static("http://card").connect_with_connector(connect).await {
                    Ok(channel) => break channel,
                    Err(e) => assert!(since.elapsed() < PATIENCE, "no card: {e}"),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            call(channel).await.map_err(Error::from)
        })
    }

    pub fn identify(&self) -> CardInfo {
        self.call(async |c| Ok(CardClient::new(c).identify(IdentifyRequest {}).await?.into_inner())).unwrap()
    }

    pub fn create(&self, spec: &DeviceSpec) -> Result<Device, Error> {
        self.create_or_check(spec, false)
    }

    pub fn create_or_check(&self, spec: &DeviceSpec, validate_only: bool) -> Result<Device, Error> {
        self.call(async |c| {
            let request = CreateDeviceRequest { spec: Some(spec.clone()), validate_only };
            Ok(CardClient::new(c).create_device(request).await?.into_inner())
        })
    }

    pub fn set_limits(&self, id: &str, limits: DeviceLimits) -> Result<Device, Error> {
        self.call(async |c| {
            let request = SetLimitsRequest { id: id.into(), limits: Some(limits), net_limits: None };
            Ok(CardClient::new(c).set_limits(request).await?.into_inner())
        })
    }

    pub fn delete(&self, id: &str) -> Result<(), Error> {
        self.call(async |c| {
            CardClient::new(c).delete_device(DeleteDeviceRequest { id: id.into() }).await?;
            Ok(())
        })
    }

    pub fn list(&self) -> Vec<Device> {
        self.call(async |c| {
            Ok(CardClient::new(c).list_devices(ListDevicesRequest {}).await?.into_inner().devices)
        })
        .unwrap()
    }

    pub fn stats(&self, id: &str) -> Result<DeviceStats, Error> {
        self.call(async |c| {
            let request = GetCardStatsRequest { device_id: id.into() };
            Ok(CardClient::new(c).get_stats(request).await?.into_inner().devices.remove(0))
        })
    }

    pub fn inspect(&self, path: &str) -> Result<ImageInfo, Error> {
        self.call(async |c| {
            let request = InspectImageRequest { path: path.into() };
            Ok(StorageCardClient::new(c).inspect_image(request).await?.into_inner())
        })
    }
}

fn spawn(dir: &Path, arguments: &[String]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_offload-blk"))
        .arg("--control")
        .arg(dir.join("control.sock"))
        .arg("--runtime-dir")
        .arg(dir)
        .args(arguments)
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

impl Drop for Card {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An image of `size` bytes in `dir`.
pub fn image(dir: &Path, name: &str, size: u64) -> String {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path.to_str().unwrap().to_owned()
}

pub fn spec(id: &str, block: BlockDeviceSpec) -> DeviceSpec {
    DeviceSpec { id: id.into(), kind: Some(Kind::Block(block)), limits: None, net_limits: None }
}

const RINGS: u64 = 0;
const RING_BYTES: u64 = 0x1_0000;
const DATA: u64 = 0x20_0000;
const MEMORY: u64 = 64 << 20;

/// A guest that uses one disk.
pub struct Guest {
    pub memory: TestGuest,
    pub queues: Vec<DriverQueue>,
}

impl Guest {
    pub fn new(queues: u64, size: u16, features: u64) -> Self {
        let memory = TestGuest::new(MEMORY);
        let queues = (0..queues).map(|i| {
            let mut queue = DriverQueue::new(&memory, RINGS + i * RING_BYTES, size, features);
            queue.index = i as u16;
            queue
        });
        Self { queues: queues.collect(), memory }
    }

    /// Memory of request `slot`: header, status, and up to 256 KiB of data, on a page.
    fn at(slot: u64) -> (u64, u64, u64) {
        let base = DATA + slot * 0x4_2000;
        assert!(base + 0x4_2000 <= MEMORY);
        (base, base + 0x100, base + 0x1000)
    }

    pub fn connect(&self, front: &mut Front) {
        front.set_up(&self.memory, self.queues[0].features() & front.offered);
        for (i, queue) in self.queues.iter().enumerate() {
            front.start(i, queue, queue.used_idx());
        }
    }

    /// Moves all memory into another file, and into `table` instead of what is there.
    pub fn move_to(&mut self, table: &MemoryTable) {
        let new = TestGuest::new(MEMORY);
        let mut all = vec![0; MEMORY as usize];
        self.memory.memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        new.memory.write_slice(&all, GuestAddress(0)).unwrap();
        self.queues.iter_mut().for_each(|queue| queue.move_to(&new));
        let file = new.file().try_clone().unwrap();
        table.replace(vec![Region::map(0, MEMORY, 0, file, 0).unwrap()]).unwrap();
        self.memory = new;
    }

    pub fn data(&self, slot: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.memory.read_slice(&mut data, GuestAddress(Self::at(slot).2)).unwrap();
        data
    }

    pub fn set_data(&self, slot: u64, data: &[u8]) {
        self.memory.memory.write_slice(data, GuestAddress(Self::at(slot).2)).unwrap();
    }

    pub fn status(&self, slot: u64) -> u8 {
        self.memory.memory.read_obj(GuestAddress(Self::at(slot).1)).unwrap()
    }

    /// Begins a request with the memory of `slot`; its head.
    pub fn begin(&mut self, queue: usize, slot: u64, kind: u32, sector: u64, length: u32) -> u16 {
        let (header, status, data) = Self::at(slot);
        self.write_header(slot, kind, sector);
        let mut buffers = vec![Buffer::readable(header, HEADER_BYTES as u32)];
        if length > 0 {
            buffers.push(Buffer { address: data, length, writable: kind != T_OUT });
        }
        buffers.push(Buffer::writable(status, 1));
        let queue = &mut self.queues[queue];
        let head = queue.add(&buffers).expect("ring has room");
        if queue.kick_wanted() {
            queue.kick();
        }
        head
    }

    /// Fills in the header and clears the status of `slot`; their addresses and the data's.
    pub fn write_header(&self, slot: u64, kind: u32, sector: u64) -> (u64, u64, u64) {
        let at = Self::at(slot);
        let memory = &self.memory.memory;
        memory.write_obj(kind, GuestAddress(at.0)).unwrap();
        memory.write_obj(0u32, GuestAddress(at.0 + 4)).unwrap();
        memory.write_obj(sector, GuestAddress(at.0 + 8)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(at.1)).unwrap();
        at
    }

    /// Does a request and waits for it; its status.
    pub fn run(&mut self, queue: usize, kind: u32, sector: u64, length: u32) -> u8 {
        let head = self.begin(queue, 0, kind, sector, length);
        let used = self.queues[queue].wait_used(PATIENCE);
        assert_eq!(used.expect("the request comes back").0, head);
        self.status(0)
    }
}

/// A front-end of a device.
pub fn connect(device: &Device) -> Front {
    Front::connect_within(Path::new(&device.socket_path), PATIENCE)
}

/// What sector `sector` has after write number `version`: every byte depends on both.
pub fn pattern(sector: u64, version: u64, length: usize) -> Vec<u8> {
    (0..length as u64 / SECTOR_BYTES)
        .flat_map(|i| {
            let seed = (sector + i).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                ^ version.wrapping_mul(0xd1b5_4a32_d192_ed03);
            (0..SECTOR_BYTES / 8)
                .flat_map(move |word| seed.wrapping_add(word.wrapping_mul(0xff51)).to_le_bytes())
        })
        .collect()
}
