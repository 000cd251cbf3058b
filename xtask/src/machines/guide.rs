//! Installing slurm-vm as docs/install.md says, and in no other way: its blocks are executed as they are written there.

use super::Machines;
use crate::{Result, error::At, paths, proc};
use std::{fs, io::Write, path::Path, process::Stdio, thread, time::Instant};

/// Where docs/install.md has the packages.
const DEBS: &str = "/srv/slurm-vm";
/// From here on it is about slurm-vm; what is before is Slurm and NFS, which machines that are not fresh have.
const OUR_PART: &str = "## 5.";

/// A block of the guide.
#[derive(Debug, PartialEq, Eq)]
struct Block<'a> {
    /// Where it is run: `all`, `ctl`, `nodes`, `alice@ctl`.
    on: &'a str,
    /// Shell.
    text: String,
}

/// The blocks that say where they are run, in their order.
fn blocks(text: &str) -> Vec<Block<'_>> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(on) = line.strip_prefix("<!-- run: ").and_then(|l| l.strip_suffix(" -->")) else {
            continue;
        };
        let block = lines
            .by_ref()
            .skip_while(|l| !l.starts_with("```"))
            .skip(1)
            .take_while(|l| !l.starts_with("```"));
        let text = block.fold(String::new(), |text, line| text + line + "\n");
        found.push(Block { on: on.trim(), text });
    }
    found
}

impl Machines {
    /// Copies the packages to where the guide has them, and follows it.
    pub fn install(&self, debs: &Path, guide: Option<&Path>) -> Result<()> {
        let packages: Vec<_> = fs::read_dir(debs)
            .at("read", debs)?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "deb"))
            .collect();
        if packages.is_empty() {
            return Err(format!("{} has no packages", debs.display()).into());
        }
        for host in self.options().hosts() {
            for package in &packages {
                let name = package.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                self.put(&host, package, &format!("{DEBS}/{name}"))?;
            }
        }
        let guide = guide.map_or_else(|| paths::project().join("docs/install.md"), Path::to_owned);
        let text = fs::read_to_string(&guide).at("read", &guide)?;
        let part = if self.options().fresh {
            text.as_str()
        } else {
            text.find(OUR_PART).map_or("", |at| &text[at..])
        };
        let blocks = blocks(part);
        if blocks.is_empty() {
            return Err(format!("{} has nothing to execute", guide.display()).into());
        }
        blocks.iter().try_for_each(|block| self.follow(block))
    }

    fn follow(&self, block: &Block<'_>) -> Result<()> {
        let (user, on) = block.on.split_once('@').unwrap_or(("root", block.on));
        let hosts = match on {
            "all" => self.options().hosts(),
            "nodes" => self.options().node_names(),
            host => vec![host.to_owned()],
        };
        let begun = Instant::now();
        println!("[{}]\n{}", block.on, block.text.trim_end());
        // Machines do not wait for each other; a person would go to one after the other.
        let results: Vec<(String, Result<String>)> = thread::scope(|scope| {
            let all: Vec<_> = hosts
                .iter()
                .map(|host| (host.clone(), scope.spawn(move || self.shell(host, user, &block.text))))
                .collect();
            let ended = all.into_iter().map(|(host, thread)| {
                let result = thread.join().unwrap_or_else(|_| Err("a panic".into()));
                (host, result)
            });
            ended.collect()
        });
        println!("[{}: {:.1} s]", block.on, begun.elapsed().as_secs_f32());
        for (host, result) in results {
            let said = result.map_err(|e| format!("{host}: {e}; the block was:\n{}", block.text))?;
            if !said.is_empty() {
                println!("{host}: {}", said.replace('\n', &format!("\n{host}: ")));
            }
        }
        Ok(())
    }

    /// Runs a text as a person would who stops at the first command that fails.
    pub fn shell(&self, host: &str, user: &str, text: &str) -> Result<String> {
        let mut child = self
            .command(host, user, &["bash", "-e", "-s"])?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .at("run", "ssh")?;
        if let Some(mut input) = child.stdin.take() {
            // The whole text at once: a program that reads its standard input must not eat what follows.
            let whole = format!("{{\n{text}\n}} </dev/null\n");
            input.write_all(whole.as_bytes()).at("write to", "ssh")?;
        }
        let output = child.wait_with_output().at("wait for", "ssh")?;
        let said = proc::text_of(&output);
        if output.status.success() {
            Ok(said)
        } else {
            Err(format!("{}: {said}", output.status).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Block, blocks};

    #[test]
    fn blocks_without_a_mark_are_not_for_us() {
        let text = "a\n```sh\nno\n```\n<!-- run: ctl -->\n```sh\none\ntwo\n```\n<!-- run: alice@ctl -->\n\n```sh\nthree\n```\n";
        let block = |on, text: &str| Block { on, text: text.into() };
        assert_eq!(blocks(text), [block("ctl", "one\ntwo\n"), block("alice@ctl", "three\n")]);
    }
}
