//! Reads the machine's apt sources: mirrors are never written down here, they are the machine's own.

use crate::{Result, error::At, proc};
use std::{fs, path::Path};

/// Suites and the mirrors that have them.
#[derive(Debug, Default)]
pub struct Sources {
    entries: Vec<(String, String)>,
}

impl Sources {
    /// Those of this machine.
    pub fn read() -> Result<Self> {
        let mut sources = Self::default();
        let list = Path::new("/etc/apt/sources.list");
        if list.exists() {
            sources.one_line_style(&fs::read_to_string(list).at("read", list)?);
        }
        let dir = Path::new("/etc/apt/sources.list.d");
        for path in fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok().map(|e| e.path()))
        {
            match path.extension().and_then(|e| e.to_str()) {
                Some("list") => sources.one_line_style(&fs::read_to_string(&path).at("read", &path)?),
                Some("sources") => sources.deb822_style(&fs::read_to_string(&path).at("read", &path)?),
                _ => {}
            }
        }
        Ok(sources)
    }

    fn one_line_style(&mut self, text: &str) {
        for line in text.lines() {
            let Some(rest) = line.trim().strip_prefix("deb ") else { continue };
            let rest = match rest.trim_start().strip_prefix('[') {
                Some(options) => options.split_once(']').map_or("", |(_, rest)| rest),
                None => rest,
            };
            let mut words = rest.split_whitespace();
            if let (Some(mirror), Some(suite)) = (words.next(), words.next()) {
                self.entries.push((suite.to_owned(), mirror.to_owned()));
            }
        }
    }

    fn deb822_style(&mut self, text: &str) {
        for stanza in text.split("\n\n") {
            let field = |name: &str| {
                stanza.lines().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    key.eq_ignore_ascii_case(name).then_some(value.trim())
                })
            };
            let disabled = field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
            let binary = field("Types").is_some_and(|types| types.split_whitespace().any(|t| t == "deb"));
            if let (false, true, Some(mirrors), Some(suites)) = (disabled, binary, field("URIs"), field("Suites"))
                && let Some(mirror) = mirrors.split_whitespace().next()
            {
                self.entries
                    .extend(suites.split_whitespace().map(|suite| (suite.to_owned(), mirror.to_owned())));
            }
        }
    }

    /// The mirror that has a suite.
    pub fn mirror_of(&self, suite: &str) -> Option<&str> {
        self.entries
            .iter()
            .find(|(name, _)| name == suite)
            .map(|(_, mirror)| mirror.as_str())
    }

    /// Debian's mirror: that of any release, which has all the others too.
    pub fn debian(&self) -> Option<&str> {
        ["bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable"]
            .iter()
            .find_map(|suite| self.mirror_of(suite))
    }
}

/// The machine's mirror of Debian.
pub fn debian_mirror() -> Result<String> {
    let sources = Sources::read()?;
    let mirror = sources.debian().map(str::to_owned);
    mirror.ok_or_else(|| "apt knows no mirror of Debian on this machine: add one to its sources".into())
}

/// apt's `Acquire::Check-Valid-Until` on this machine, for mmdebstrap, which does not read the machine's own settings: a site whose mirror stands
/// still has switched it off.
pub fn check_dates() -> &'static str {
    let dated = proc::run("apt-config", &["dump", "--format=%v", "Acquire::Check-Valid-Until"]).unwrap_or_default();
    if dated.trim() == "false" { "false" } else { "true" }
}

#[cfg(test)]
mod tests {
    use super::Sources;

    #[test]
    fn both_styles_of_sources_are_read() {
        let mut sources = Sources::default();
        sources.one_line_style("# deb http://no x main\ndeb [arch=amd64 signed-by=/k] http://m/debian bookworm-backports main\n");
        sources.deb822_style("Types: deb\n# a note\nURIs: http://m2/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\nTypes: deb\nEnabled: no\nURIs: http://off\nSuites: sid\n");
        assert_eq!(sources.mirror_of("bookworm-backports"), Some("http://m/debian"));
        assert_eq!(sources.mirror_of("bookworm-updates"), Some("http://m2/debian"));
        assert_eq!(sources.mirror_of("sid"), None);
        assert_eq!(sources.debian(), Some("http://m2/debian"));
    }
}
