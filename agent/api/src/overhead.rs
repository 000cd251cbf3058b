//! How much memory QEMU needs beside the guest's own RAM: the difference between a job's allocation and what its guest gets.
//!
//! The model is a sum, not a share, because most of it does not grow with the guest: QEMU's code, heap, display-less devices and I/O
//! buffers (96 MiB), stacks and per-CPU state (8 MiB a vCPU), and what does grow: page tables of host and guest and the dirty bitmap of a
//! live migration (1/512 and 1/32768 of the RAM, taken together as 1/480 and rounded up).

/// MiB of QEMU itself, whatever the guest.
pub const BASE_MIB: u64 = 96;
/// MiB for each vCPU.
pub const PER_VCPU_MIB: u64 = 8;
/// One MiB of tables for each so many MiB of guest RAM.
pub const RAM_PER_TABLE_MIB: u64 = 480;
/// The smallest guest that is worth a boot.
pub const MIN_GUEST_MIB: u64 = 64;

/// Memory that QEMU needs beside `mem_mib` of guest RAM, in MiB.
#[must_use]
pub fn qemu_overhead_mib(mem_mib: u64, vcpus: u32) -> u64 {
    BASE_MIB + PER_VCPU_MIB * u64::from(vcpus) + mem_mib.div_ceil(RAM_PER_TABLE_MIB)
}

/// The guest RAM that fits an allocation, in MiB, or `None` when the allocation is too small for any guest.
#[must_use]
pub fn guest_mib_for(allocation_mib: u64, vcpus: u32) -> Option<u64> {
    let left = allocation_mib.checked_sub(BASE_MIB + PER_VCPU_MIB * u64::from(vcpus))?;
    // left = mem + ceil(mem / R): start from the bound without rounding and step down at most once or twice.
    let mut mem = left * RAM_PER_TABLE_MIB / (RAM_PER_TABLE_MIB + 1) + 1;
    while mem > 0 && mem + mem.div_ceil(RAM_PER_TABLE_MIB) > left {
        mem -= 1;
    }
    (mem >= MIN_GUEST_MIB).then_some(mem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_small_guest_pays_mostly_the_base() {
        assert_eq!(qemu_overhead_mib(256, 1), 96 + 8 + 1);
        assert_eq!(qemu_overhead_mib(262_144, 16), 96 + 128 + 547);
    }

    #[test]
    fn an_allocation_below_the_base_holds_no_guest() {
        assert_eq!(guest_mib_for(100, 1), None);
        assert_eq!(guest_mib_for(160, 1), None);
    }

    proptest! {
        #[test]
        fn the_largest_guest_that_fits_is_found(allocation in 300_u64..4_000_000, vcpus in 1_u32..8) {
            let mem = guest_mib_for(allocation, vcpus).expect("fits");
            prop_assert!(mem + qemu_overhead_mib(mem, vcpus) <= allocation);
            prop_assert!(mem + 1 + qemu_overhead_mib(mem + 1, vcpus) > allocation);
        }
    }
}
