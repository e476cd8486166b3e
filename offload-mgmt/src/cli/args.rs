//! The command line.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use ipnet::IpNet;

use super::options::security::RuleOption;
use super::options::{Decimal, DiskOption, NicOption, Size};

/// Creates and manages Outboard VMs.
#[derive(Debug, Parser)]
#[command(name = "outboard", version = crate::VERSION, after_help = AFTER, propagate_version = true)]
pub(crate) struct Cli {
    /// The controller's API socket
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        env = "OUTBOARD_SOCKET",
        value_name = "SOCKET",
        default_value = "/run/outboard/api.sock"
    )]
    pub socket: PathBuf,
    /// How to print: tables for people, json for programs (one document; events: one object per line)
    #[arg(long, short, global = true, help_heading = GLOBAL, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER: &str = "\
Exit status:
  0  done
  1  the operation failed
  2  the command line is wrong
  3  there is no such VM, network or security group
  4  the controller cannot be reached

Examples:
  outboard network create default --tap ob0 --address 10.88.0.1/24
  outboard vm create web --kernel /boot/vmlinuz --initramfs /boot/initrd.img \\
      --disk /srv/web.img --nic default
  outboard vm ls
  outboard vm console web";

/// Heading of the options that every command has.
const GLOBAL: &str = "Global options";

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

// By hand: with their comments as help, the two values would take half of every help page.
impl ValueEnum for Output {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Table, Self::Json]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::Table => "table",
            Self::Json => "json",
        }))
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Networks that VMs are plugged into
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Security groups: what VMs may send and get in networks with a prefix
    #[command(subcommand, visible_alias = "sg")]
    SecurityGroup(SecurityGroupCommand),
    /// Cards: the processes that serve disks and networks
    #[command(subcommand)]
    Card(CardCommand),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  outboard completion bash > /etc/bash_completion.d/outboard")]
    Completion {
        /// The shell
        shell: Shell,
    },
}

/// `outboard vm ...`
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a VM and start it
    Create(Box<Create>),
    /// List the VMs
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  outboard vm ls\n  outboard vm ls -o json | jq -r '.[].name'"
    )]
    Ls,
    /// Show a VM: what it is made of, its state, its devices' links
    #[command(after_help = "Examples:\n  outboard vm show web\n  outboard vm show web -o json | jq .slots")]
    Show(Name),
    /// Start a stopped VM
    #[command(after_help = "Example:\n  outboard vm start web")]
    Start(Name),
    /// Stop a VM: press its power button, wait, then end it
    #[command(
        after_help = "Examples:\n  outboard vm stop web\n  outboard vm stop web --timeout 5m\n  outboard vm stop web --force"
    )]
    Stop {
        #[command(flatten)]
        vm: Name,
        /// How long the guest may take before it is ended, like 90s or 5m
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
        timeout: Duration,
        /// Do not ask the guest: end it at once, as pulling the plug would
        #[arg(long, short)]
        force: bool,
    },
    /// Reset a running VM, as its reset button would
    #[command(after_help = "Example:\n  outboard vm reboot web")]
    Reboot(Name),
    /// Make a disk of a running VM longer, its image with it; the guest sees it at once
    #[command(
        after_help = "Examples:\n  outboard vm resize-disk web disk0 20G\n  lvextend -L 20G /dev/vg0/db && outboard vm resize-disk db data"
    )]
    ResizeDisk {
        #[command(flatten)]
        vm: Name,
        /// The disk's id, as in: outboard vm show
        #[arg(value_name = "DISK")]
        disk: String,
        /// Its new size; without one, what its image or block device has become
        #[arg(value_name = "SIZE")]
        size: Option<Size>,
    },
    /// Set what a VM may do with a disk or a network interface per second, at once; what is not given is not limited any more
    #[command(
        after_help = "Examples:\n  outboard vm limit web disk0 --iops 500 --bps 50M\n  outboard vm limit web disk0 --iops 500 --iops-burst 30000\n  outboard vm limit web nic0 --rate-out 1G --rate-in 1G --pps-out 100K\n  outboard vm limit web disk0"
    )]
    Limit(Box<Limit>),
    /// Capture what goes through a network interface of a running VM, as a pcapng file on standard output
    ///
    /// Frames from the guest are "outbound" in it, those to the guest "inbound". It ends with Ctrl-C. What comes faster than
    /// it is read is left out and counted; the VM's traffic never waits for it.
    #[command(
        after_help = "Examples:\n  outboard vm capture web | tshark -r -\n  outboard vm capture web nic1 --count 1000 --snaplen 128 > web.pcapng"
    )]
    Capture {
        #[command(flatten)]
        vm: Name,
        /// Id of the interface [default: the only one]
        #[arg(value_name = "NIC")]
        nic: Option<String>,
        /// Keep no more than the first so many bytes of each frame
        #[arg(long, short, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..))]
        snaplen: Option<u32>,
        /// End after so many frames
        #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
    },
    /// Remove a VM; its disk images stay
    #[command(
        visible_alias = "remove",
        after_help = "Examples:\n  outboard vm rm web\n  outboard vm rm web --force"
    )]
    Rm {
        #[command(flatten)]
        vm: Name,
        /// End it first if it runs
        #[arg(long, short)]
        force: bool,
    },
    /// Attach to a VM's serial console; Ctrl-] leaves it
    ///
    /// On a terminal every key goes to the guest but Ctrl-]. Without one, standard input is passed on until it ends,
    /// and output is printed until the VM ends.
    #[command(
        after_help = "Examples:\n  outboard vm console web\n  echo 'uname -a' | outboard vm console web --new"
    )]
    Console {
        #[command(flatten)]
        vm: Name,
        /// Leave out what the VM wrote before
        #[arg(long)]
        new: bool,
    },
    /// Follow what happens to a VM or to all
    #[command(
        after_help = "Examples:\n  outboard vm events\n  outboard vm events web -o json | jq -r .event"
    )]
    Events {
        /// Id or name; all VMs without it
        #[arg(value_name = "VM")]
        vm: Option<String>,
    },
    /// Show a running VM's counters
    #[command(
        after_help = "Examples:\n  outboard vm stats web\n  outboard vm stats web -o json | jq .data_path_exits"
    )]
    Stats(Name),
}

/// `outboard vm limit`
#[derive(Debug, Args)]
pub(crate) struct Limit {
    /// The VM.
    #[command(flatten)]
    pub vm: Name,
    /// Id of the disk or network interface
    #[arg(value_name = "DEVICE")]
    pub device: String,
    /// Disk: requests per second
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,
    /// Disk: requests that may be done at once after a pause [default: a hundredth of a second's]
    #[arg(long, value_name = "N")]
    pub iops_burst: Option<u64>,
    /// Disk: bytes per second, reads and writes together
    #[arg(long, value_name = "SIZE")]
    pub bps: Option<Size>,
    /// Disk: bytes that may be moved at once after a pause [default: a hundredth of a second's]
    #[arg(long, value_name = "SIZE")]
    pub bps_burst: Option<Size>,
    /// Interface: bits per second from the guest; K, M, G are powers of 1000. What is more waits
    #[arg(long, value_name = "BITS")]
    pub rate_out: Option<Decimal>,
    /// Interface: bits that may go out at once after a pause [default: a hundredth of a second's]
    #[arg(long, value_name = "BITS")]
    pub rate_out_burst: Option<Decimal>,
    /// Interface: packets per second from the guest
    #[arg(long, value_name = "N")]
    pub pps_out: Option<Decimal>,
    /// Interface: packets that may go out at once after a pause [default: a hundredth of a second's]
    #[arg(long, value_name = "N")]
    pub pps_out_burst: Option<Decimal>,
    /// Interface: bits per second to the guest. What is more is dropped
    #[arg(long, value_name = "BITS")]
    pub rate_in: Option<Decimal>,
    /// Interface: bits that may come in at once after a pause [default: a hundredth of a second's]
    #[arg(long, value_name = "BITS")]
    pub rate_in_burst: Option<Decimal>,
    /// Interface: packets per second to the guest
    #[arg(long, value_name = "N")]
    pub pps_in: Option<Decimal>,
    /// Interface: packets that may come in at once after a pause [default: a hundredth of a second's]
    #[arg(long, value_name = "N")]
    pub pps_in_burst: Option<Decimal>,
}

/// Names one VM.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Its id or name
    #[arg(value_name = "VM")]
    pub vm: String,
}

/// `outboard vm create`
#[derive(Debug, Args)]
#[command(after_help = CREATE_EXAMPLES)]
pub(crate) struct Create {
    /// Its name: a-z, 0-9 and '-'
    pub name: String,
    /// A bzImage, or an ELF kernel with a PVH note
    #[arg(long, short, value_name = "FILE")]
    pub kernel: String,
    /// Its initial RAM disk
    #[arg(long, short, value_name = "FILE")]
    pub initramfs: Option<String>,
    /// Its command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub cmdline: String,
    /// Guest memory, a multiple of 2M
    #[arg(long, short, value_name = "SIZE", default_value = "512M")]
    pub memory: Size,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u32,
    /// A disk: an image or a block device; in the order given, the guest's /dev/vda, /dev/vdb, ...
    ///
    /// FILE, or path=FILE[,format=raw|qcow2][,id=ID][,readonly][,direct][,queues=N][,card=CARD]. Without a format it is
    /// raw. A comma in a path is written twice.
    #[arg(long = "disk", short, value_name = "DISK")]
    pub disks: Vec<DiskOption>,
    /// A network interface
    ///
    /// NETWORK, or network=NETWORK[,mac=MAC][,address=IP]...[,id=ID][,mtu=N][,queue-pairs=N][,card=CARD]
    /// [,security-group=NAME]...[,connections=N], and limits as in outboard vm limit:
    /// [,rate-out=BITS][,rate-in=BITS][,pps-out=N][,pps-in=N], each also with -burst.
    ///
    /// With security groups it gets and sends what their rules allow, and up to N connections (65536) are tracked for it.
    #[arg(long = "nic", short, value_name = "NIC")]
    pub nics: Vec<NicOption>,
    /// An SSH public key for its user, or a file with such keys; may be given several times
    ///
    /// The guest is told by the metadata service (169.254.169.254) of a network with a prefix, for example by cloud-init.
    #[arg(long = "ssh-key", value_name = "KEY|FILE")]
    pub ssh_keys: Vec<String>,
    /// A file with user data for its first boot, up to 16K: a script, a cloud-config
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Whether the metadata service answers requests without a token, as cloud-init sends them outside of EC2
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Tokens::Required)]
    pub metadata_tokens: Tokens,
    /// Have no metadata service for it
    #[arg(long, conflicts_with_all = ["ssh_keys", "user_data", "metadata_tokens"])]
    pub no_metadata: bool,
    /// Define it only
    #[arg(long)]
    pub no_start: bool,
    /// Makes repeating the command safe: with the same token and options, the VM made before is the answer
    #[arg(long, value_name = "TOKEN")]
    pub token: Option<String>,
}

/// When a request to the metadata service must come with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tokens {
    /// Always.
    Required,
    /// Never; one that is wrong is refused.
    Optional,
}

const CREATE_EXAMPLES: &str = "\
Examples:
  outboard vm create web --kernel /boot/vmlinuz --initramfs /boot/initrd.img \\
      --cmdline 'console=ttyS0 root=/dev/vda rw' --disk /srv/web.img --nic default
  outboard vm create db --kernel vmlinux --memory 4G --vcpus 4 \\
      --disk path=/srv/root.qcow2,format=qcow2 --disk path=/srv/db.img,queues=4,direct \\
      --nic network=default,mac=02:00:00:12:34:56
  outboard vm create app --kernel vmlinuz --disk /srv/cloud.img --nic lan \\
      --ssh-key ~/.ssh/id_ed25519.pub --user-data cloud-config.yaml --metadata-tokens optional";

/// `outboard network ...`
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Create a network
    #[command(
        after_help = "Examples:\n  outboard network create private\n  outboard network create default --tap ob0 --address 10.88.0.1/24\n  outboard network create lan --tap ob1 --prefix 10.89.0.0/24 --nat\n  outboard network create office --interface eth1 --prefix 192.168.7.0/24 --gateway 192.168.7.254"
    )]
    Create {
        /// Its name: a-z, 0-9 and '-'
        name: String,
        /// Name of the host's interface in it; without one the network is for VMs only
        #[arg(long, value_name = "INTERFACE")]
        tap: Option<String>,
        /// An interface that the host has, physical or one end of a veth pair, through which its VMs reach what is behind it
        ///
        /// It is not configured, and the host itself is not reached by it. With --prefix, that is the network behind it: VMs
        /// get addresses of it from here and not from there.
        #[arg(long, value_name = "INTERFACE", conflicts_with_all = ["tap", "addresses"])]
        interface: Option<String>,
        /// The gateway behind --interface [default: the first address of --prefix]
        #[arg(long, value_name = "ADDRESS", requires_all = ["interface", "prefixes"])]
        gateway: Option<Ipv4Addr>,
        /// An address of the host in it, like 10.88.0.1/24; may be given several times
        #[arg(long = "address", value_name = "ADDRESS/LENGTH")]
        addresses: Vec<String>,
        /// Its network, like 10.88.0.0/24; may be given once for IPv4 and once for IPv6
        ///
        /// Every VM then gets its addresses from it, by DHCP, and can use no others. The gateway is the host's address in
        /// it, else its first address. Without a prefix the network is a plain switch.
        #[arg(long = "prefix", value_name = "PREFIX/LENGTH")]
        prefixes: Vec<IpNet>,
        /// A name server that DHCP tells, up to three times [default: the gateway, if there is an interface of the host]
        #[arg(long = "dns", value_name = "ADDRESS", requires = "prefixes")]
        dns: Vec<Ipv4Addr>,
        /// Let its VMs reach what the host reaches, under the host's address; needs --tap and --prefix
        ///
        /// Nobody out there begins a connection to them. The host needs the package nftables.
        #[arg(long, requires_all = ["tap", "prefixes"])]
        nat: bool,
        /// Largest packet in bytes [default: 1500]
        #[arg(long, value_name = "BYTES")]
        mtu: Option<u32>,
        /// Name of the network card it is on [default: net, else the first network card that answers]
        #[arg(long, value_name = "CARD")]
        card: Option<String>,
    },
    /// List the networks
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  outboard network ls\n  outboard network ls -o json"
    )]
    Ls,
    /// Remove a network that no VM uses
    #[command(visible_alias = "remove", after_help = "Example:\n  outboard network rm private")]
    Rm {
        /// Its name
        name: String,
    },
}

/// `outboard security-group ...`
#[derive(Debug, Subcommand)]
pub(crate) enum SecurityGroupCommand {
    /// Create a security group
    ///
    /// Rules are stateful: what answers an allowed connection is allowed. Without egress rules its VMs may open any
    /// connection; without ingress rules none may be opened to them.
    #[command(
        after_help = "Examples:\n  outboard security-group create web --ingress tcp,ports=443 --ingress icmp\n  outboard security-group create db --no-egress --ingress tcp,ports=5432,from=web\n  outboard vm create a --kernel vmlinux --nic network=lan,security-group=web,security-group=db"
    )]
    Create {
        /// Its name: a-z, 0-9 and '-'
        name: String,
        #[command(flatten)]
        rules: Rules,
        /// Let its VMs open no connections but by --egress
        #[arg(long)]
        no_egress: bool,
        /// Name of the network card it is on [default: net, else the first network card that answers]
        #[arg(long, value_name = "CARD")]
        card: Option<String>,
    },
    /// List the security groups
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  outboard security-group ls\n  outboard security-group ls -o json"
    )]
    Ls,
    /// Show a security group's rules, and the devices that have it
    #[command(after_help = "Example:\n  outboard security-group show web")]
    Show {
        /// Its name
        name: String,
    },
    /// Add rules, at once
    #[command(
        after_help = "Examples:\n  outboard security-group allow web --ingress tcp,ports=8000-8080,from=10.88.0.0/24\n  outboard security-group allow web --egress udp,ports=53,to=10.88.0.1/32"
    )]
    Allow {
        /// Its name
        name: String,
        #[command(flatten)]
        rules: Rules,
    },
    /// Take rules away, at once: connections that no rule allows any more are cut
    #[command(after_help = "Example:\n  outboard security-group revoke web --ingress tcp,ports=443")]
    Revoke {
        /// Its name
        name: String,
        #[command(flatten)]
        rules: Rules,
    },
    /// Remove a security group that no VM has
    #[command(
        visible_aliases = ["remove", "delete"],
        after_help = "Example:\n  outboard security-group rm web"
    )]
    Rm {
        /// Its name
        name: String,
    },
}

/// Rules of a security group.
#[derive(Debug, Args)]
pub(crate) struct Rules {
    /// Connections that may be opened to its VMs; may be given several times
    ///
    /// PROTOCOL[,ports=N[-N]][,from=PEER]. PROTOCOL is tcp, udp, icmp, icmpv6 or any; without ports all. PEER is a prefix
    /// like 10.88.0.0/24, or a security group: the VMs in the same network that have it; without one, everybody.
    #[arg(long = "ingress", value_name = "RULE")]
    pub ingress: Vec<RuleOption>,
    /// Connections that its VMs may open, with to=PEER; may be given several times
    #[arg(long = "egress", value_name = "RULE")]
    pub egress: Vec<RuleOption>,
}

/// `outboard card ...`
#[derive(Debug, Subcommand)]
pub(crate) enum CardCommand {
    /// List the cards and whether they answer
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  outboard card ls\n  outboard card ls -o json"
    )]
    Ls,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn leaves(command: &clap::Command, path: &str, found: &mut Vec<(String, String)>) {
        for sub in command.get_subcommands() {
            let path = format!("{path} {}", sub.get_name());
            if sub.has_subcommands() {
                leaves(sub, &path, found);
            } else {
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                found.push((path, help));
            }
        }
    }

    /// Each has an example, of itself, that the command line takes.
    #[test]
    fn every_command_has_examples_that_work() {
        let mut found = Vec::new();
        leaves(&Cli::command(), "outboard", &mut found);
        assert!(found.len() >= 15, "{found:?}");
        for (path, help) in found {
            assert!(help.starts_with("Example"), "{path} has no example: {help:?}");
            let text = help.replace("\\\n", " ");
            let examples: Vec<_> = text.lines().filter_map(|l| Some(&l[l.find("outboard ")?..])).collect();
            assert!(examples.iter().any(|e| e.starts_with(&path)), "{path}: {help}");
            for example in examples {
                let command = example.split(['|', '>']).next().unwrap_or_default();
                // No shell is needed for quotes that hold no blank; those around a command line do.
                let words = command.split('\'').enumerate().flat_map(|(i, part)| {
                    if i % 2 == 1 { vec![part] } else { part.split_whitespace().collect() }
                });
                if let Err(e) = Cli::try_parse_from(words) {
                    panic!("{example}: {e}");
                }
            }
        }
    }

    #[test]
    fn the_default_card_of_a_network_is_told_as_it_is() {
        let help = Cli::command()
            .find_subcommand_mut("network")
            .and_then(|n| n.find_subcommand_mut("create"))
            .map(|c| c.render_long_help().to_string())
            .unwrap_or_default();
        assert!(help.contains("[default: net, else the first network card that answers]"), "{help}");
    }

    #[test]
    fn a_bad_size_says_how_to_write_one() {
        let e = Cli::try_parse_from(["outboard", "vm", "create", "a", "--kernel", "k", "--memory", "lots"])
            .expect_err("no size");
        assert!(e.to_string().contains("powers of 1024"), "{e}");
        assert_eq!(e.exit_code(), 2);
    }
}
