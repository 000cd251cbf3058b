//! The command line of `svm`.
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Where the configuration of a node or controller is.
pub const DEFAULT_CONFIG: &str = "/etc/slurm-vm/slurm-vm.toml";

const EXIT_CODES: &str = "Exit codes: 0 done; 1 refused, not found, or something found wrong; 2 wrong usage; 3 no agent answers.";

/// Shows and moves the virtual machines of Slurm jobs.
#[derive(Debug, Parser)]
#[command(name = "svm", version, about = "Shows and moves the virtual machines of Slurm jobs", after_help = EXIT_CODES)]
pub struct Args {
    /// The agent's socket
    #[arg(long, global = true, value_name = "PATH", default_value = slurm_vm_api::hooks::AGENT_SOCKET)]
    pub socket: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// What `svm` does.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List VMs, like squeue: your own, or for root and SlurmUser everyone's
    List {
        /// Those that have ended too
        #[arg(short, long)]
        all: bool,
        /// What VMs have been given in sum, too
        #[arg(short, long)]
        totals: bool,
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
    /// All about the VM of a job, its moves, and what a preemption would do to it
    Show {
        /// Job id
        job: u32,
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
    /// How a job's VM was made and what its guest wrote on the console
    Log {
        /// Go on until the VM is gone
        #[arg(short, long)]
        follow: bool,
        /// Job id
        job: u32,
    },
    /// Move a running job's VM to another node, under the same job id
    Migrate {
        /// Job id
        job: u32,
        /// Where to; Slurm chooses if it is not given
        #[arg(conflicts_with = "cancel")]
        node: Option<String>,
        /// Stop a move that is under way; the VM goes on where it is
        #[arg(long)]
        cancel: bool,
    },
    /// Whether VMs can be started on this node (from the controller: on all)
    Health {
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
    /// Settings of slurm.conf that are missing or unwise, and what they cost
    Check {
        /// One JSON document
        #[arg(long)]
        json: bool,
    },
    /// Images for --vm
    Images {
        /// Names only
        #[arg(long, conflicts_with = "json")]
        names: bool,
        /// One JSON document
        #[arg(long)]
        json: bool,
        /// The configuration to read
        #[arg(long, value_name = "PATH", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound_and_a_node_and_cancel_exclude_each_other() {
        Args::command().debug_assert();
        assert!(Args::try_parse_from(["svm", "migrate", "12", "n2"]).is_ok());
        assert!(Args::try_parse_from(["svm", "migrate", "12", "--cancel"]).is_ok());
        assert!(Args::try_parse_from(["svm", "migrate", "12", "n2", "--cancel"]).is_err());
        assert!(Args::try_parse_from(["svm", "show", "twelve"]).is_err());
    }

    #[test]
    fn the_page_names_every_subcommand_and_option() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/svm.md")).expect("docs/svm.md");
        for verb in Args::command().get_subcommands() {
            assert!(page.contains(&format!("svm {}", verb.get_name())), "{}", verb.get_name());
            for option in verb.get_arguments().filter_map(|a| a.get_long()) {
                assert!(page.contains(&format!("--{option}")), "{} --{option}", verb.get_name());
            }
        }
    }
}
