//! Log lines on stderr: under systemd with the priority prefix of sd-daemon(3), else with the time.
use std::io::Write;

struct Stderr {
    journal: bool,
}

impl log::Log for Stderr {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if !record.target().starts_with("slurm_vm") && record.level() > log::Level::Warn {
            return;
        }
        let line = if self.journal {
            let priority = match record.level() {
                log::Level::Error => 3,
                log::Level::Warn => 4,
                log::Level::Info => 6,
                log::Level::Debug | log::Level::Trace => 7,
            };
            format!("<{priority}>{}\n", record.args())
        } else {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default();
            let level = record.level().as_str().to_lowercase();
            format!(
                "{} {level}: {}\n",
                crate::text::utc(u64::try_from(now.as_millis()).unwrap_or(0)),
                record.args()
            )
        };
        // A log that cannot be written has nowhere to say so.
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Installs the logger; `verbose` adds debug lines.
pub fn init(verbose: bool) {
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let level = if verbose { log::LevelFilter::Debug } else { log::LevelFilter::Info };
    if log::set_boxed_logger(Box::new(Stderr { journal })).is_ok() {
        log::set_max_level(level);
    }
}
