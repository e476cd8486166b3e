//! CPUID as the guest sees it: what KVM supports, with the topology and the identity of each vCPU.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// Physical address width if CPUID does not say (AMD64 Architecture Programmer's Manual, Fn8000_0008).
const DEFAULT_ADDRESS_BITS: u8 = 36;

/// The timing leaf of the hypervisor range: EAX TSC frequency, EBX local APIC timer frequency, both in kHz.
const TIMING_LEAF: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;

/// CPUID without what differs between vCPUs.
#[derive(Debug, Clone)]
pub struct CpuidTemplate {
    base: CpuId,
    vcpus: u32,
}

impl CpuidTemplate {
    /// For `vcpus` vCPUs: one socket, one thread per core.
    ///
    /// # Errors
    /// If KVM does not tell what it supports.
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, kvm_ioctls::Error> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self::from_supported(supported, vcpus, kvm.check_extension(Cap::TscDeadlineTimer)))
    }

    fn from_supported(mut base: CpuId, vcpus: u8, tsc_deadline: bool) -> Self {
        let vcpus = u32::from(vcpus);
        let sharing = vcpus.next_power_of_two();
        // Ours to describe, see `for_vcpu`.
        base.retain(|e| !matches!(e.function, 0xb | 0x1f | TIMING_LEAF));
        for e in base.as_mut_slice() {
            match e.function {
                1 => {
                    e.ebx = e.ebx & 0x0000_ffff | sharing.min(0xff) << 16;
                    e.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
                    if tsc_deadline {
                        e.ecx |= ECX_TSC_DEADLINE;
                    }
                    e.edx = if vcpus > 1 { e.edx | EDX_HTT } else { e.edx & !EDX_HTT };
                }
                // Caches: the last level is the socket's, the others a core's own.
                4 if e.eax & 0x1f != 0 => {
                    let level = e.eax >> 5 & 7;
                    let threads = if level >= 3 { sharing - 1 } else { 0 };
                    e.eax = e.eax & 0x3fff | threads << 14 | (sharing - 1).min(0x3f) << 26;
                }
                0x8000_001d if e.eax & 0x1f != 0 => {
                    let level = e.eax >> 5 & 7;
                    let threads = if level >= 3 { vcpus - 1 } else { 0 };
                    e.eax = e.eax & 0x3fff | threads << 14;
                }
                // AMD: number of threads, and bits of the APIC id that number them.
                0x8000_0008 => e.ecx = e.ecx & !0xf0ff | (vcpus - 1) & 0xff | sharing.trailing_zeros() << 12,
                // AMD: one thread per core, one node.
                0x8000_001e => (e.ebx, e.ecx) = (0, 0),
                _ => {}
            }
        }
        Self { base, vcpus }
    }

    /// Guest-physical address width in bits.
    pub fn address_bits(&self) -> u8 {
        let leaf = self.base.as_slice().iter().find(|e| e.function == 0x8000_0008);
        leaf.map_or(DEFAULT_ADDRESS_BITS, |e| (e.eax & 0xff) as u8)
    }

    /// CPUID of vCPU `index`, whose TSC runs at `tsc_khz` (if known).
    ///
    /// # Errors
    /// If there is no room for one more leaf.
    pub fn for_vcpu(&self, index: u8, tsc_khz: Option<u32>) -> Result<CpuId, vmm_sys_util::fam::Error> {
        let mut cpuid = self.base.clone();
        let id = u32::from(index);
        let (mut max_leaf, mut has_hypervisor_leaves) = (0, false);
        for e in cpuid.as_mut_slice() {
            match e.function {
                0 => max_leaf = e.eax,
                1 => e.ebx = e.ebx & 0x00ff_ffff | id << 24,
                0x8000_001e => (e.eax, e.ebx) = (id, e.ebx | id & 0xff),
                0x4000_0000 => {
                    has_hypervisor_leaves = true;
                    if tsc_khz.is_some() {
                        e.eax = e.eax.max(TIMING_LEAF);
                    }
                }
                _ => {}
            }
        }
        if max_leaf >= 0xb {
            // Extended topology: level 0 threads (type 1), level 1 cores (type 2), then none.
            let core_bits = self.vcpus.next_power_of_two().trailing_zeros();
            for (level, (shift, count, kind)) in
                (0u32..).zip([(0, 1, 1), (core_bits, self.vcpus, 2), (0, 0, 0)])
            {
                cpuid.push(kvm_cpuid_entry2 {
                    function: 0xb,
                    index: level,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: level | kind << 8,
                    edx: id,
                    ..Default::default()
                })?;
            }
        }
        if let (Some(khz), true) = (tsc_khz, has_hypervisor_leaves) {
            cpuid.push(kvm_cpuid_entry2 {
                function: TIMING_LEAF,
                eax: khz,
                ebx: APIC_BUS_KHZ,
                ..Default::default()
            })?;
        }
        Ok(cpuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(vcpus: u8) -> CpuidTemplate {
        let leaf = |function, index, eax| kvm_cpuid_entry2 { function, index, eax, ..Default::default() };
        let entries = [
            leaf(0, 0, 0x1f),
            leaf(1, 0, 0),
            leaf(4, 0, 1 | 1 << 5),
            leaf(4, 3, 3 | 3 << 5),
            leaf(0xb, 0, 77),
            leaf(0x4000_0000, 0, 0x4000_0001),
            leaf(0x8000_0008, 0, 0x2e),
        ];
        CpuidTemplate::from_supported(CpuId::from_entries(&entries).unwrap(), vcpus, true)
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = cpuid.as_slice().iter().filter(|e| (e.function, e.index) == (function, index));
        let leaf = *found.next().unwrap();
        assert!(found.next().is_none());
        leaf
    }

    #[test]
    fn every_vcpu_has_its_id_and_the_topology() {
        let cpuid = template(3).for_vcpu(2, Some(2_000_000)).unwrap();
        let one = leaf(&cpuid, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (2, 4));
        assert_ne!(one.ecx & ECX_HYPERVISOR, 0);
        assert_ne!(one.ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(one.edx & EDX_HTT, 0);
        let cores = leaf(&cpuid, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 14, 3 << 12);
        assert_eq!(leaf(&cpuid, 4, 3).eax >> 14 & 0xfff, 3);
        let timing = leaf(&cpuid, TIMING_LEAF, 0);
        assert_eq!((timing.eax, timing.ebx), (2_000_000, 1_000_000));
        assert_eq!(leaf(&cpuid, 0x4000_0000, 0).eax, TIMING_LEAF);
        assert_eq!(template(1).address_bits(), 46);
    }

    #[test]
    fn a_single_vcpu_is_no_multiprocessor() {
        let cpuid = template(1).for_vcpu(0, None).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).edx & EDX_HTT, 0);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 0);
        assert!(cpuid.as_slice().iter().all(|e| e.function != TIMING_LEAF));
    }
}
