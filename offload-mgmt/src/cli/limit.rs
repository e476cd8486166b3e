//! `outboard vm limit`: what a VM may do with a disk or a network interface.

use proto::v1::{
    DeviceLimits, GetVmRequest, NetLimits, SetDiskLimitsRequest, SetNicLimitsRequest, Vm as VmMessage,
};

use super::args::{Cli, Limit};
use super::client::{Client, QUICK};
use super::failure::Failure;
use super::options::{Decimal, Size};
use super::{now_us, render, view};

impl Limit {
    fn of_disk(&self) -> DeviceLimits {
        let size = |s: Option<Size>| s.map_or(0, |s| s.0);
        DeviceLimits {
            operations_per_second: self.iops.unwrap_or_default(),
            operations_burst: self.iops_burst.unwrap_or_default(),
            bytes_per_second: size(self.bps),
            bytes_burst: size(self.bps_burst),
        }
    }

    fn of_nic(&self) -> NetLimits {
        let number = |n: Option<Decimal>| n.unwrap_or_default().0;
        NetLimits {
            bits_per_second_out: number(self.rate_out),
            bits_burst_out: number(self.rate_out_burst),
            packets_per_second_out: number(self.pps_out),
            packets_burst_out: number(self.pps_out_burst),
            bits_per_second_in: number(self.rate_in),
            bits_burst_in: number(self.rate_in_burst),
            packets_per_second_in: number(self.pps_in),
            packets_burst_in: number(self.pps_in_burst),
        }
    }

    fn names_disk_limits(&self) -> bool {
        self.iops.is_some() || self.iops_burst.is_some() || self.bps.is_some() || self.bps_burst.is_some()
    }

    fn names_nic_limits(&self) -> bool {
        let all = [
            self.rate_out,
            self.rate_out_burst,
            self.pps_out,
            self.pps_out_burst,
            self.rate_in,
            self.rate_in_burst,
            self.pps_in,
            self.pps_in_burst,
        ];
        all.iter().any(Option::is_some)
    }
}

/// Sets a device's limits.
///
/// # Errors
/// Options that are not for this kind of device, or what the controller says.
pub(super) async fn set(cli: &Cli, client: &Client, options: &Limit) -> Result<(), Failure> {
    let mut api = client.api();
    let (vm, device) = (options.vm.vm.clone(), options.device.clone());
    let doing = format!("Setting the limits of {device}");
    // Which kind it is the options need not say: without any, all limits go.
    let known = client.wait(&doing, QUICK, api.get_vm(GetVmRequest { vm: vm.clone() })).await?;
    let is_nic = is_nic(&known, options)?;
    let wrong = |has: &str, options: &str| {
        Failure::Local(format!("{device} is {has}, which has no such limits"), format!("use: {options}"))
    };
    let (answer, words) = if is_nic {
        if options.names_disk_limits() {
            return Err(wrong("a network interface", "--rate-out, --rate-in, --pps-out, --pps-in"));
        }
        let limits = options.of_nic();
        let request = SetNicLimitsRequest { vm, nic: device.clone(), limits: Some(limits) };
        let answer = client.wait(&doing, QUICK, api.set_nic_limits(request)).await?;
        (answer, render::net_limits(&limits.into()))
    } else {
        if options.names_nic_limits() {
            return Err(wrong("a disk", "--iops, --bps"));
        }
        let limits = options.of_disk();
        let request = SetDiskLimitsRequest { vm, disk: device.clone(), limits: Some(limits) };
        let answer = client.wait(&doing, QUICK, api.set_disk_limits(request)).await?;
        (answer, render::limits(&limits.into()))
    };
    let vm = view::Vm::new(answer, now_us());
    render::print(cli.output, &vm, || match words.as_str() {
        "" => format!("{device} of {} has no limits\n", vm.name),
        words => format!("{device} of {} may do {words}\n", vm.name),
    })
}

/// Whether the device is a network interface. One that the VM does not have is what the options are for: the controller
/// says that it is not there.
fn is_nic(vm: &VmMessage, options: &Limit) -> Result<bool, Failure> {
    let Some(spec) = &vm.spec else { return Ok(false) };
    let (disk, nic) = (options.names_disk_limits(), options.names_nic_limits());
    if disk && nic {
        return Err(Failure::Local(
            "these are limits of a disk and of a network interface at once".to_owned(),
            "give those of one device at a time".to_owned(),
        ));
    }
    let is_disk = spec.disks.iter().any(|d| d.id == options.device);
    Ok(!is_disk && (nic || spec.nics.iter().any(|n| n.id == options.device)))
}
