//! The plugin's words in plugstack.conf: `required spank_vm.so key=value …`.
#![forbid(unsafe_code)]
use slurm_vm_api::{
    hooks::{AGENT_SOCKET, EPILOG_WAIT},
    shim::DEFAULT_RUN,
    spec::PreemptWay,
    time,
};
use std::path::PathBuf;

/// What an administrator may set, with its defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `socket=PATH`: the agent's socket.
    pub socket: PathBuf,
    /// `run=PATH`: the shim.
    pub run: String,
    /// `prefix=WORD`: the options are `--WORD`, `--WORD-cpus` and so on.
    pub prefix: String,
    /// `feature=NAME`: the feature of VM nodes.
    pub feature: String,
    /// `images=PATH`: the list of known images.
    pub images: PathBuf,
    /// `log=PATH`: where Slurm's own lines about VM batch steps go.
    pub log: PathBuf,
    /// `preempt=LIST`: the ways that this site allows, in its order.
    pub preempt: Option<Vec<PreemptWay>>,
    /// `notice=SIGNAL@SECONDS`: the notice that batch jobs ask for.
    pub notice: String,
    /// `epilog_wait=TIME`: how long the epilog waits for the VM to leave.
    pub epilog_wait_s: u32,
    /// What could not be understood: one sentence each.
    pub complaints: Vec<String>,
}

const KNOWN: &str = "socket, run, prefix, feature, images, log, preempt, notice and epilog_wait";

impl Default for Settings {
    fn default() -> Self {
        Settings {
            socket: AGENT_SOCKET.into(),
            run: DEFAULT_RUN.to_owned(),
            prefix: "vm".to_owned(),
            feature: "vm".to_owned(),
            images: "/etc/slurm-vm/images.list".into(),
            log: "/var/log/slurm-vm/steps.log".into(),
            preempt: None,
            notice: "60@60".to_owned(),
            epilog_wait_s: u32::try_from(EPILOG_WAIT.as_secs()).unwrap_or(60),
            complaints: Vec::new(),
        }
    }
}

impl Settings {
    /// Reads the words. What cannot be understood is put down as a complaint and has no other effect: a typing error in this file must
    /// not stop a cluster.
    pub fn parse(words: &[String]) -> Settings {
        let mut settings = Settings::default();
        for word in words {
            if let Err(why) = settings.take(word) {
                settings.complaints.push(format!("vm: plugstack.conf: '{word}' is ignored: {why}"));
            }
        }
        settings
    }

    fn take(&mut self, word: &str) -> Result<(), String> {
        let (key, value) = word
            .split_once('=')
            .ok_or_else(|| format!("expected key=value; the keys are {KNOWN}"))?;
        let path = || {
            if value.starts_with('/') {
                Ok(value)
            } else {
                Err("the path must begin with /".to_owned())
            }
        };
        match key {
            "socket" => self.socket = path()?.into(),
            "run" => self.run = path()?.to_owned(),
            "images" => self.images = path()?.into(),
            "log" => self.log = path()?.into(),
            "prefix" => {
                let good = |(i, c): (usize, char)| c.is_ascii_lowercase() || (i > 0 && (c.is_ascii_digit() || c == '-'));
                if value.is_empty() || value.len() > 32 || !value.chars().enumerate().all(good) {
                    return Err("a prefix is up to 32 lower-case letters, digits and hyphens, beginning with a letter".to_owned());
                }
                self.prefix = value.to_owned();
            }
            "feature" => {
                if value.is_empty() || !value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.')) {
                    return Err("a feature is letters, digits, dots, underscores and hyphens".to_owned());
                }
                self.feature = value.to_owned();
            }
            "preempt" => self.preempt = Some(PreemptWay::parse_list(value).map_err(|e| e.to_string())?),
            "notice" => {
                let parsed = value.split_once('@').map(|(s, t)| (s.parse::<u8>(), t.parse::<u16>()));
                // 34 to 64 are the real-time signals that libc leaves to programs.
                if !matches!(parsed, Some((Ok(34..=64), Ok(1..)))) {
                    return Err("a notice is SIGNAL@SECONDS with a real-time signal from 34 to 64 and 1 to 65535 seconds".to_owned());
                }
                self.notice = value.to_owned();
            }
            "epilog_wait" => self.epilog_wait_s = time::parse_seconds(value).map_err(|e| e.to_string())?,
            _ => return Err(format!("there is no key '{key}'; the keys are {KNOWN}")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Settings {
        Settings::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_page_lists_every_key_with_its_default() {
        let page = include_str!("../../docs/options.md");
        let section = page.split("plugstack.conf\n").nth(1).expect("the section");
        let row = |line: &str| {
            line.strip_prefix("| `")?
                .split_once("` | ")
                .map(|(k, r)| (k.to_owned(), r.split(" |").next().unwrap_or_default().replace('`', "")))
        };
        let rows: Vec<(String, String)> = section.lines().filter_map(row).collect();
        let d = Settings::default();
        let show = |p: &PathBuf| p.display().to_string();
        let expected = [
            ("socket", show(&d.socket)),
            ("run", d.run.clone()),
            ("prefix", d.prefix.clone()),
            ("feature", d.feature.clone()),
            ("images", show(&d.images)),
            ("log", show(&d.log)),
            ("preempt", "none".to_owned()),
            ("notice", d.notice.clone()),
            ("epilog_wait", d.epilog_wait_s.to_string()),
        ];
        assert_eq!(KNOWN.replace(" and ", ", "), expected.clone().map(|(k, _)| k).join(", "));
        assert_eq!(rows, expected.map(|(k, v)| (k.to_owned(), v)));
    }

    #[test]
    fn every_key_is_taken() {
        let s = parse("socket=/s run=/r prefix=guest feature=kvm images=/i log=/l preempt=save,requeue notice=50@90 epilog_wait=2:00");
        assert_eq!(s.complaints, Vec::<String>::new());
        assert_eq!(
            (s.socket.to_str(), s.run.as_str(), s.prefix.as_str(), s.feature.as_str()),
            (Some("/s"), "/r", "guest", "kvm")
        );
        assert_eq!(
            (s.images.to_str(), s.log.to_str(), s.notice.as_str(), s.epilog_wait_s),
            (Some("/i"), Some("/l"), "50@90", 120)
        );
        assert_eq!(s.preempt, Some(vec![PreemptWay::Save, PreemptWay::Requeue]));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_known_and_changes_nothing() {
        for word in [
            "sockets=/s",
            "socket",
            "socket=rel",
            "prefix=-a",
            "prefix=A",
            "feature=a|b",
            "preempt=fly",
            "notice=9@60",
            "epilog_wait=0",
        ] {
            let s = parse(word);
            assert_eq!(s.complaints.len(), 1, "{word}");
            assert!(s.complaints[0].contains(&format!("'{word}' is ignored")), "{:?}", s.complaints);
            assert_eq!(Settings { complaints: vec![], ..s }, Settings::default(), "{word}");
        }
        assert!(parse("sockets=/s").complaints[0].contains("the keys are socket, run, prefix"));
    }
}
