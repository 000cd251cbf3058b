//! Slurm's numbers of CPUs and the kernel's.
//!
//! `scontrol show job -d` counts a node's CPUs in Slurm's own ("abstract") order: socket by socket, core by core, thread by thread (slurmd's block map, which
//! follows hwloc's logical order). The kernel's numbers are the firmware's choice: often the second threads of all cores come in the upper half, or sockets take
//! turns. Pinning needs the kernel's.

use super::expand_numbers;
use crate::effects::Files;
use std::{collections::BTreeMap, path::Path};

/// Where the kernel shows its CPUs (Documentation/ABI/stable/sysfs-devices-system-cpu).
pub const SYSFS: &str = "/sys/devices/system";

/// The CPUs of this host by core, in Slurm's order; each core with the kernel's numbers of its threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCpus(Vec<Vec<u32>>);

impl HostCpus {
    /// Reads the CPUs that are online; `None` if the kernel does not show them. `sysfs` is [`SYSFS`], but for tests.
    #[must_use]
    pub fn read(files: &dyn Files, sysfs: &Path) -> Option<Self> {
        let text = |path: &Path| String::from_utf8(files.read(path).ok()?).ok();
        let numbers = |path: &Path| expand_numbers(text(path)?.trim()).ok();
        let online = numbers(&sysfs.join("cpu/online"))?;
        // hwloc orders what lies beside each other by the lowest number inside: packages, NUMA nodes, dies, third-level caches, cores.
        let lowest = |path: &Path| numbers(path).and_then(|all| all.into_iter().min()).unwrap_or(0);
        let mut nodes: BTreeMap<u32, u32> = BTreeMap::new();
        for node in files.list(&sysfs.join("node")).unwrap_or_default() {
            let cpus = numbers(&node.join("cpulist")).unwrap_or_default();
            for cpu in &cpus {
                nodes.insert(*cpu, cpus.iter().copied().min().unwrap_or(0));
            }
        }
        let mut packages: BTreeMap<String, u32> = BTreeMap::new();
        let mut cores: BTreeMap<[u32; 5], Vec<u32>> = BTreeMap::new();
        let mut sorted = online;
        sorted.sort_unstable();
        for cpu in &sorted {
            let topology = sysfs.join(format!("cpu/cpu{cpu}/topology"));
            let package = text(&topology.join("physical_package_id"))?;
            let package = *packages.entry(package).or_insert(*cpu);
            let siblings = numbers(&topology.join("thread_siblings_list"))?;
            // Of a sibling that is offline nothing can be had.
            let first = siblings.into_iter().filter(|s| sorted.binary_search(s).is_ok()).min()?;
            let caches = files.list(&sysfs.join(format!("cpu/cpu{cpu}/cache"))).unwrap_or_default();
            let third = caches
                .iter()
                .find(|c| text(&c.join("level")).is_some_and(|level| level.trim() == "3"));
            let third = third.map_or(0, |c| lowest(&c.join("shared_cpu_list")));
            let die = lowest(&topology.join("die_cpus_list"));
            let node = nodes.get(&first).copied().unwrap_or(0);
            cores.entry([package, node, die, third, first]).or_default().push(*cpu);
        }
        Some(Self(cores.into_values().collect()))
    }

    /// The kernel's numbers of CPUs that Slurm allocated on a node declared with so many cores (sockets times cores of a socket) of so many threads. The first
    /// threads of all cores come first, so that who takes one CPU after the other takes one core after the other.
    ///
    /// A node may be declared otherwise than it is: with one thread for a core, and then a CPU is a whole core; or by its number of CPUs alone
    /// (`CPUs=8`), and then a CPU is a thread (slurmd.c since 23.11). `None` if Slurm gave CPUs that this host does not
    /// have (a test cluster, a cloud node): then nothing can be said.
    #[must_use]
    pub fn of_slurm(&self, cpus: &[u32], cores: u32, threads: u32) -> Option<Vec<u32>> {
        if threads > 1 {
            let mut sorted = cpus.to_vec();
            sorted.sort_by_key(|n| (n % threads, *n));
            let cpu = |n: &u32| self.0.get((n / threads) as usize)?.get((n % threads) as usize).copied();
            return sorted.iter().map(cpu).collect();
        }
        let all: Vec<u32> = self.0.concat();
        if cores as usize == all.len() {
            return cpus.iter().map(|n| all.get(*n as usize).copied()).collect();
        }
        let cores: Vec<&Vec<u32>> = cpus.iter().map(|n| self.0.get(*n as usize)).collect::<Option<_>>()?;
        let most = cores.iter().map(|core| core.len()).max().unwrap_or(0);
        Some(
            (0..most)
                .flat_map(|thread| cores.iter().filter_map(move |core| core.get(thread).copied()))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effects::SystemFiles;
    use std::fs;

    /// CPUs as (number, package, siblings), and NUMA nodes by their lists.
    fn host(cpus: &[(u32, u32, &str)], nodes: &[&str]) -> (tempfile::TempDir, Option<HostCpus>) {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: String, text: String| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (cpu, package, siblings) in cpus {
            write(format!("cpu/cpu{cpu}/topology/physical_package_id"), format!("{package}\n"));
            write(format!("cpu/cpu{cpu}/topology/thread_siblings_list"), format!("{siblings}\n"));
        }
        for (k, list) in nodes.iter().enumerate() {
            write(format!("node/node{k}/cpulist"), format!("{list}\n"));
        }
        let online: Vec<String> = cpus.iter().map(|c| c.0.to_string()).collect();
        write("cpu/online".into(), format!("{}\n", online.join(",")));
        let read = HostCpus::read(&SystemFiles, dir.path());
        (dir, read)
    }

    /// Two sockets that take turns, two cores each, the second threads in the upper half.
    const TURNS: [(u32, u32, &str); 8] = [
        (0, 0, "0,4"),
        (1, 1, "1,5"),
        (2, 0, "2,6"),
        (3, 1, "3,7"),
        (4, 0, "0,4"),
        (5, 1, "1,5"),
        (6, 0, "2,6"),
        (7, 1, "3,7"),
    ];

    #[test]
    fn slurm_counts_by_socket_core_and_thread_whatever_the_kernel_counts_by() {
        let (_dir, cpus) = host(&TURNS, &["0,2,4,6", "1,3,5,7"]);
        let cpus = cpus.unwrap();
        let one = |n| cpus.of_slurm(&[n], 4, 2).unwrap()[0];
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(one), [0, 4, 2, 6, 1, 5, 3, 7]);
    }

    #[test]
    fn one_thread_of_each_core_comes_before_the_second_of_any() {
        let (_dir, cpus) = host(&TURNS, &[]);
        assert_eq!(cpus.unwrap().of_slurm(&[0, 1, 2, 3], 4, 2).unwrap(), [0, 2, 4, 6]);
    }

    #[test]
    fn a_node_declared_by_its_number_of_cpus_counts_threads() {
        let (_dir, cpus) = host(&TURNS, &[]);
        assert_eq!(cpus.unwrap().of_slurm(&[2, 3, 7], 8, 1).unwrap(), [2, 6, 7]);
    }

    #[test]
    fn a_node_declared_without_threads_gets_whole_cores() {
        let (_dir, cpus) = host(&TURNS, &["0,2,4,6", "1,3,5,7"]);
        assert_eq!(cpus.unwrap().of_slurm(&[1, 2], 4, 1).unwrap(), [2, 1, 6, 5]);
    }

    #[test]
    fn numa_nodes_within_a_socket_come_one_after_the_other() {
        let flat: Vec<(u32, u32, String)> = (0..4).map(|n| (n, 0, n.to_string())).collect();
        let flat: Vec<(u32, u32, &str)> = flat.iter().map(|(n, p, s)| (*n, *p, s.as_str())).collect();
        let (_dir, cpus) = host(&flat, &["0,2", "1,3"]);
        let cpus = cpus.unwrap();
        assert_eq!(cpus.of_slurm(&[0, 1, 2, 3], 4, 1).unwrap(), [0, 2, 1, 3]);
    }

    #[test]
    fn cores_under_one_third_level_cache_come_together() {
        let (dir, _) = host(&[(0, 0, "0"), (1, 0, "1"), (2, 0, "2"), (3, 0, "3")], &[]);
        for cpu in 0..4 {
            let cache = dir.path().join(format!("cpu/cpu{cpu}/cache/index3"));
            fs::create_dir_all(&cache).unwrap();
            fs::write(cache.join("level"), "3\n").unwrap();
            fs::write(cache.join("shared_cpu_list"), if cpu % 2 == 0 { "0,2\n" } else { "1,3\n" }).unwrap();
        }
        let cpus = HostCpus::read(&SystemFiles, dir.path()).unwrap();
        assert_eq!(cpus.of_slurm(&[0, 1, 2, 3], 4, 1).unwrap(), [0, 2, 1, 3]);
    }

    #[test]
    fn an_offline_cpu_is_left_out_and_one_that_is_not_there_is_not_invented() {
        let (_dir, cpus) = host(&[(0, 0, "0,2"), (1, 0, "1,3"), (3, 0, "1,3")], &[]);
        let cpus = cpus.unwrap();
        assert_eq!(cpus.of_slurm(&[0, 2, 3], 2, 2).unwrap(), [0, 1, 3]);
        assert_eq!(cpus.of_slurm(&[1], 2, 2), None);
        assert_eq!(cpus.of_slurm(&[2], 2, 1), None);
    }

    #[test]
    fn this_host_has_as_many_cpus_as_it_runs_on() {
        let cpus = HostCpus::read(&SystemFiles, Path::new(SYSFS)).unwrap();
        let all: usize = cpus.0.iter().map(Vec::len).sum();
        let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
        assert_eq!(all, expand_numbers(online.trim()).unwrap().len());
    }
}
