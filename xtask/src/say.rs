//! What the newcomer's commands (`demo`, `test`) print: phases with their times, and the progress of the long ones on one line.

use crate::{Result, error::At};
use std::{
    fs,
    io::{BufRead, BufReader, IsTerminal, Write},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Width of the column with a phase's name.
const NAME: usize = 12;
/// Off a terminal, a phase that takes long says so this often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// One phase: a line when it ends, with its time; while it runs, one line that changes, if that is a terminal.
#[derive(Debug)]
pub struct Phase {
    name: &'static str,
    begun: Instant,
    said: Instant,
}

impl Phase {
    /// Begins.
    pub fn begin(name: &'static str, what: &str) -> Self {
        let phase = Self {
            name,
            begun: Instant::now(),
            said: Instant::now(),
        };
        if on_terminal() {
            phase.show(what);
        }
        phase
    }

    fn show(&self, text: &str) {
        print!("\r\x1b[K{:NAME$}{}", self.name, text.chars().take(90).collect::<String>());
        let _ = std::io::stdout().flush();
    }

    /// What it is doing at the moment.
    pub fn now(&mut self, text: &str) {
        if on_terminal() {
            self.show(&format!("{text} ({})", seconds(self.begun.elapsed())));
        } else if self.said.elapsed() > SIGN_OF_LIFE {
            self.said = Instant::now();
            println!("{:NAME$}... {text} ({})", self.name, seconds(self.begun.elapsed()));
        }
    }

    /// Takes the changing line away, so that something else can be printed.
    pub fn pause(&self) {
        if on_terminal() {
            print!("\r\x1b[K");
        }
    }

    /// Ends well: the line that stays.
    pub fn done(self, text: &str) -> Duration {
        self.pause();
        let took = self.begun.elapsed();
        println!("{:NAME$}{text} ({})", self.name, seconds(took));
        took
    }
}

fn on_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// `3.2 s`, `2 min 05 s`.
pub fn seconds(time: Duration) -> String {
    let whole = time.as_secs();
    if whole >= 60 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

/// Runs a command whose many lines are of interest only if it fails: each goes to `log`, and to `on_line`, which may show it as progress.
/// A failure says the last `tail` lines.
pub fn run(command: &mut Command, log: &Path, tail: usize, mut on_line: impl FnMut(&str)) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir).at("create", dir)?;
    }
    let mut file = fs::File::create(log).at("create", log)?;
    // One pipe for both streams: what belongs together stays together.
    let (reader, writer) = std::io::pipe().at("make a pipe for", &name)?;
    let second = writer.try_clone().at("make a pipe for", &name)?;
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    let mut child = command.spawn().at("run", &name)?;
    // Our own copies of the writing end would keep the pipe open.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut lines = Vec::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.at("read the output of", &name)?;
        let line = String::from_utf8_lossy(&line).into_owned();
        writeln!(file, "{line}").at("write", log)?;
        on_line(line.trim());
        lines.push(line);
    }
    let status = child.wait().at("wait for", &name)?;
    if status.success() {
        return Ok(());
    }
    let last = lines[lines.len().saturating_sub(tail)..].join("\n");
    Err(format!("`{}` failed ({status}); all of it is in {}:\n{last}", words(command), log.display()).into())
}

fn words(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|w| w.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::{run, seconds};
    use std::{process::Command, time::Duration};

    #[test]
    fn times_read_well() {
        assert_eq!(seconds(Duration::from_millis(3210)), "3.2 s");
        assert_eq!(seconds(Duration::from_secs(125)), "2 min 05 s");
    }

    #[test]
    fn a_failed_command_says_its_last_lines_and_where_the_rest_is() {
        let log = std::env::temp_dir().join(format!("xtask-say-{}.log", std::process::id()));
        let mut seen = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; echo three; exit 4"]);
        let error = run(&mut command, &log, 2, |line| seen.push(line.to_owned()))
            .expect_err("it failed")
            .to_string();
        assert_eq!(seen, ["one", "two", "three"]);
        assert!(
            error.contains("two\nthree") && !error.contains("\none") && error.contains("exit status: 4"),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&log).expect("a log"), "one\ntwo\nthree\n");
        std::fs::remove_file(&log).expect("clean");
    }
}
