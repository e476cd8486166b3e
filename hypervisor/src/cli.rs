//! The command line.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use lexopt::prelude::*;
use proto::v1::{BootSource, HypervisorConfig, SlotConfig};

/// What `--help` prints.
pub const HELP: &str = "\
One KVM virtual machine: CPUs and memory, and devices that other processes serve by vhost-user.

Usage:
  outboard-hypervisor --control SOCKET [--id NAME]
      Wait for orders (gRPC outboard.v1.Hypervisor) on a Unix socket. Without --control the socket is the one that
      the service manager passes (LISTEN_FDS).
  outboard-hypervisor --kernel FILE [OPTIONS]
      Boot at once, with the guest's serial console on standard input and output. Ctrl-] ends the VM.

Options:
      --kernel FILE      kernel to boot: a bzImage, or an ELF with a PVH entry point
      --initramfs FILE   initial RAM disk
      --cmdline TEXT     the kernel's command line
      --memory SIZE      RAM, with suffix M or G, a multiple of 2M [default: 128M]
      --vcpus N          number of vCPUs [default: 1]
      --device SOCKET,id=ID[,queues=N][,queue-size=N][,config-size=N][,name=NAME]
                         plug in the device that is served at this vhost-user socket; may be given several times.
                         ID is the virtio device id: 1 network, 2 block, 4 entropy, 26 file system, ...
                         queues: number of virtqueues [default: as many as the device says]
                         queue-size: largest ring [default: 256]
                         config-size: length of the device's configuration space in bytes [default: 60]
                         name: the slot's name in messages and statistics [default: slot0, slot1, ...]
      --console WHERE    stdio or none [default: stdio]
      --id NAME          the VM's name, for process listings and messages [default: vm]
      --control SOCKET   serve orders there (too)
  -h, --help             print this
  -V, --version          print the version

Exit status: 0 if the VM ended as asked for by guest, person or signal; 1 if it failed; 2 for a wrong command line.

Examples:
  outboard-hypervisor --control /run/vm1.sock --id vm1
  outboard-hypervisor --kernel vmlinuz --initramfs initrd.img --cmdline 'console=ttyS0' --memory 512M --vcpus 2
  outboard-hypervisor --kernel vmlinuz --cmdline 'console=ttyS0 root=/dev/vda rw' \\
      --device /run/outboard-blk/devices/disk1.sock,id=2
";

/// Where the guest's console goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Standard input and output.
    Stdio,
    /// Only to subscribers of the control service.
    None,
}

/// What the process is to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Where to serve orders.
    pub control: Option<PathBuf>,
    /// What to boot at once.
    pub boot: Option<HypervisorConfig>,
    /// Where the console goes if booted at once.
    pub console: ConsoleTarget,
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
    /// Run a VM.
    Run(Box<Options>),
}

/// What is wrong with a command line, for a person.
#[derive(Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (see --help)", self.0)
    }
}

impl std::error::Error for UsageError {}

impl From<lexopt::Error> for UsageError {
    fn from(e: lexopt::Error) -> Self {
        Self(e.to_string())
    }
}

/// Parses the arguments after the program's name. Relative paths are made absolute.
///
/// # Errors
/// What is wrong with them.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let (mut control, mut id, mut console) = (None, None, None);
    let mut boot = BootSource::default();
    let mut config = HypervisorConfig { vcpus: 1, memory_bytes: 128 << 20, ..Default::default() };
    // An option that only makes sense with --kernel.
    let mut boots = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Long("control") => control = Some(PathBuf::from(parser.value()?)),
            Long("id") => id = Some(parser.value()?.string()?),
            Long("kernel") => boot.kernel_path = absolute(&parser.value()?)?,
            Long("initramfs") => {
                (boots, boot.initramfs_path) = (Some("--initramfs"), absolute(&parser.value()?)?);
            }
            Long("cmdline") => (boots, boot.cmdline) = (Some("--cmdline"), parser.value()?.string()?),
            Long("memory") => {
                (boots, config.memory_bytes) = (Some("--memory"), size(&parser.value()?.string()?)?);
            }
            Long("vcpus") => (boots, config.vcpus) = (Some("--vcpus"), parser.value()?.parse()?),
            Long("device") => {
                boots = Some("--device");
                config.slots.push(device(&parser.value()?.string()?, config.slots.len())?);
            }
            Long("console") => {
                boots = Some("--console");
                console = Some(match parser.value()?.string()?.as_str() {
                    "stdio" => ConsoleTarget::Stdio,
                    "none" => ConsoleTarget::None,
                    other => return Err(UsageError(format!("--console is stdio or none, not {other}"))),
                });
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let boot = if boot.kernel_path.is_empty() {
        if let Some(option) = boots {
            return Err(UsageError(format!("{option} needs --kernel")));
        }
        None
    } else {
        config.vm_id = id.unwrap_or_else(|| "vm".to_owned());
        config.boot = Some(boot);
        Some(config)
    };
    let console = console.unwrap_or(ConsoleTarget::Stdio);
    Ok(Command::Run(Box::new(Options { control, boot, console })))
}

fn absolute(path: &OsStr) -> Result<String, UsageError> {
    let path = Path::new(path);
    let absolute = std::path::absolute(path).map_err(|e| UsageError(format!("{}: {e}", path.display())))?;
    absolute.into_os_string().into_string().map_err(|p| UsageError(format!("{} is no UTF-8", p.display())))
}

/// Bytes of a size with suffix.
fn size(text: &str) -> Result<u64, UsageError> {
    let wrong = || UsageError(format!("{text:?} is no size; write e.g. 512M or 2G"));
    let (number, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(wrong)
}

/// `SOCKET,id=ID[,key=value]...`
fn device(text: &str, index: usize) -> Result<SlotConfig, UsageError> {
    let mut parts = text.split(',');
    let socket_path = absolute(OsStr::new(parts.next().unwrap_or_default()))?;
    let mut slot = SlotConfig { id: format!("slot{index}"), socket_path, ..Default::default() };
    for part in parts {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| UsageError(format!("--device {text}: {part:?} is no key=value")))?;
        let number = || {
            value
                .parse()
                .map_err(|_| UsageError(format!("--device {text}: {value:?} is no number for {key}")))
        };
        match key {
            "id" => slot.virtio_device_id = number()?,
            "queues" => slot.queues = number()?,
            "queue-size" => slot.queue_size = number()?,
            "config-size" => slot.config_size = number()?,
            "name" => value.clone_into(&mut slot.id),
            _ => return Err(UsageError(format!("--device {text}: {key} is not known"))),
        }
    }
    if slot.virtio_device_id == 0 {
        return Err(UsageError(format!(
            "--device {text}: add ,id=ID with the virtio device id: 2 for a block device, 1 for a network device"
        )));
    }
    Ok(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Options {
        match parse(arguments.iter().map(OsString::from)) {
            Ok(Command::Run(options)) => *options,
            other => panic!("{other:?}"),
        }
    }

    fn wrong(arguments: &[&str]) -> String {
        parse(arguments.iter().map(OsString::from)).unwrap_err().to_string()
    }

    #[test]
    fn orders_are_awaited_without_a_kernel() {
        let options = run(&["--control", "/run/x.sock", "--id", "vm1"]);
        assert_eq!((options.control, options.boot), (Some("/run/x.sock".into()), None));
    }

    #[test]
    fn a_kernel_is_booted_at_once() {
        let options = run(&[
            "--kernel",
            "/k",
            "--initramfs=/i",
            "--cmdline",
            "a b",
            "--memory",
            "2G",
            "--vcpus",
            "3",
            "--console",
            "none",
            "--device",
            "/run/d.sock,id=2,queues=4",
            "--device",
            "/run/e.sock,id=1,name=nic",
        ]);
        let config = options.boot.unwrap();
        assert_eq!((config.vcpus, config.memory_bytes, config.vm_id.as_str()), (3, 2 << 30, "vm"));
        let boot = config.boot.unwrap();
        assert_eq!(
            (boot.kernel_path.as_str(), boot.initramfs_path.as_str(), boot.cmdline.as_str()),
            ("/k", "/i", "a b")
        );
        assert_eq!(
            (config.slots[0].id.as_str(), config.slots[0].virtio_device_id, config.slots[0].queues),
            ("slot0", 2, 4)
        );
        assert_eq!(
            (config.slots[1].id.as_str(), config.slots[1].socket_path.as_str()),
            ("nic", "/run/e.sock")
        );
        assert_eq!(options.console, ConsoleTarget::None);
    }

    #[test]
    fn relative_paths_are_made_absolute() {
        let kernel = run(&["--kernel", "k"]).boot.unwrap().boot.unwrap().kernel_path;
        assert_eq!(PathBuf::from(kernel), std::env::current_dir().unwrap().join("k"));
    }

    #[test]
    fn mistakes_are_named() {
        for (arguments, what) in [
            (&["--memory", "1G"][..], "--memory needs --kernel"),
            (&["--kernel", "/k", "--memory", "lots"], "no size"),
            (&["--kernel", "/k", "--memory", "99999999999G"], "no size"),
            (&["--kernel", "/k", "--device", "/d"], "add ,id=ID"),
            (&["--kernel", "/k", "--device", "/d,id=x"], "no number"),
            (&["--kernel", "/k", "--device", "/d,speed=9"], "not known"),
            (&["--kernel", "/k", "--console", "file"], "stdio or none"),
            (&["--turbo"], "turbo"),
            (&["--kernel"], "kernel"),
        ] {
            assert!(wrong(arguments).contains(what), "{arguments:?}: {}", wrong(arguments));
        }
    }

    #[test]
    fn help_names_every_option() {
        for option in
            ["kernel", "initramfs", "cmdline", "memory", "vcpus", "device", "console", "id", "control"]
        {
            assert!(HELP.contains(&format!("--{option}")));
        }
        assert_eq!(parse([OsString::from("-h")]), Ok(Command::Help));
        assert_eq!(parse([OsString::from("--version")]), Ok(Command::Version));
    }
}
