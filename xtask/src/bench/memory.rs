//! Free memory as a machine of its own has it.
//!
//! A virtual machine may have given its free memory back to its host (free page reporting of virtio-balloon, two seconds after the pages became free).
//! The first touch of such a page then waits for the host: here 170 ms for 100 MiB in huge pages, 4 ms for the second. Which turn pays for it is a matter
//! of luck, and no matter of what is measured. So the pages that a turn will get are touched right before it, by all arms alike.

use crate::Result;
use memmap2::{Advice, MmapMut};

/// Bytes between two touches: the smallest page.
const PAGE: usize = 4096;

/// Takes `mib` MiB of free memory in huge pages, writes to each page and gives it all back: the kernel hands out first what was freed last.
pub fn touch(mib: usize) -> Result<()> {
    let mut memory = MmapMut::map_anon(mib << 20).map_err(|e| format!("cannot take {mib} MiB of memory: {e}"))?;
    // Refused by a kernel without huge pages, where small ones serve as well.
    let _ = memory.advise(Advice::HugePage);
    for page in memory.chunks_mut(PAGE) {
        page[0] = 1;
    }
    Ok(())
}
