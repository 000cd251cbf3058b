//! Host directories that a user wants in the guest: what `--vm-mount` may say.
//!
//! ```text
//! list   = wish *("," wish)
//! wish   = "none" | "home" | "workdir" | path [":" path] [":ro" | ":rw"]
//! ```
//! Paths are absolute, without `..`, commas and colons. `none` takes back what the site gives to every job.
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use thiserror::Error;

/// The most entries of a list: each is a device of the guest and a process on the host.
pub const MAX_MOUNTS: usize = 8;
/// The longest path in bytes, Linux's PATH_MAX with its end.
const MAX_PATH: usize = 4095;
/// Below these nothing of the host is put: the guest's kernel and init own them.
const KERNELS: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];
/// These are the guest's own, and what is below them may be covered.
const SYSTEMS: [&str; 11] = [
    "/", "/bin", "/boot", "/etc", "/lib", "/lib64", "/root", "/sbin", "/usr", "/var", "/tmp",
];

/// One entry of `--vm-mount`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MountWish {
    /// Nothing of what the site gives by default.
    None,
    /// The user's home.
    Home,
    /// The job's working directory.
    Workdir,
    /// This directory.
    Directory(Mount),
}

/// A directory of the host and where the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// On the host.
    pub source: String,
    /// In the guest.
    pub target: String,
    /// The guest may not write.
    pub readonly: bool,
}

/// Why an entry was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MountError {
    /// A path is not absolute, or not a plain one.
    #[error("'{0}' is not an absolute path without '..': write SRC[:DST][:ro], or home, workdir or none")]
    Path(String),
    /// Something else than a mode at the end.
    #[error("'{0}' is neither ro nor rw: write SRC[:DST][:ro]")]
    Mode(String),
    /// A place that the guest itself needs.
    #[error("'{0}' is the guest's own: name another place with SRC:DST")]
    Guests(String),
    /// Two of them at one place.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// Too many.
    #[error("more than {MAX_MOUNTS} directories")]
    TooMany,
}

/// A plain absolute path without a slash at the end.
///
/// # Errors
/// [`MountError::Path`]
pub fn plain_path(text: &str) -> Result<String, MountError> {
    let bad = || MountError::Path(text.chars().take(100).collect());
    let strange = |c: char| c.is_control() || matches!(c, ',' | ':');
    if !text.starts_with('/') || text.len() > MAX_PATH || text.contains(strange) {
        return Err(bad());
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return Err(bad());
    }
    Ok(format!("/{}", parts.join("/")))
}

/// Whether a directory of the host can be seen at this place of the guest.
///
/// # Errors
/// [`MountError::Guests`]
pub fn check_target(target: &str) -> Result<(), MountError> {
    let below = |dir: &str| {
        target
            .strip_prefix(dir)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if SYSTEMS.contains(&target) || KERNELS.into_iter().any(below) {
        return Err(MountError::Guests(target.to_owned()));
    }
    Ok(())
}

impl FromStr for MountWish {
    type Err = MountError;

    fn from_str(text: &str) -> Result<Self, MountError> {
        match text {
            "none" => return Ok(Self::None),
            "home" => return Ok(Self::Home),
            "workdir" => return Ok(Self::Workdir),
            _ => {}
        }
        let mut parts = text.split(':');
        let source = plain_path(parts.next().unwrap_or_default())?;
        let (mut target, mut readonly) = (source.clone(), false);
        let rest: Vec<&str> = parts.collect();
        let (path, mode) = match rest[..] {
            [] => (None, None),
            [one] if one.starts_with('/') => (Some(one), None),
            [one] => (None, Some(one)),
            [path, mode] => (Some(path), Some(mode)),
            _ => return Err(MountError::Path(text.chars().take(100).collect())),
        };
        if let Some(path) = path {
            target = plain_path(path)?;
        }
        match mode {
            None | Some("rw") => {}
            Some("ro") => readonly = true,
            Some(other) => return Err(MountError::Mode(other.chars().take(100).collect())),
        }
        check_target(&target)?;
        Ok(Self::Directory(Mount { source, target, readonly }))
    }
}

impl fmt::Display for MountWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Home => f.write_str("home"),
            Self::Workdir => f.write_str("workdir"),
            Self::Directory(Mount { source, target, readonly }) => {
                f.write_str(source)?;
                if target != source {
                    write!(f, ":{target}")?;
                }
                if *readonly { f.write_str(":ro") } else { Ok(()) }
            }
        }
    }
}

impl TryFrom<String> for MountWish {
    type Error = MountError;

    fn try_from(text: String) -> Result<Self, MountError> {
        text.parse()
    }
}

impl From<MountWish> for String {
    fn from(wish: MountWish) -> Self {
        wish.to_string()
    }
}

/// Reads what `--vm-mount` says.
///
/// # Errors
/// Names the entry and what is allowed.
pub fn parse_list(text: &str) -> Result<Vec<MountWish>, MountError> {
    let wishes = text
        .split(',')
        .map(|wish| wish.trim().parse())
        .collect::<Result<Vec<MountWish>, _>>()?;
    check_list(&wishes)?;
    Ok(wishes)
}

/// What holds for a list as a whole.
///
/// # Errors
/// [`MountError::TooMany`], [`MountError::Twice`]
pub fn check_list(wishes: &[MountWish]) -> Result<(), MountError> {
    if wishes.len() > MAX_MOUNTS {
        return Err(MountError::TooMany);
    }
    let place = |wish: &MountWish| match wish {
        MountWish::Directory(mount) => mount.target.clone(),
        word => word.to_string(),
    };
    for (i, wish) in wishes.iter().enumerate() {
        if wishes[..i].iter().any(|before| place(before) == place(wish)) {
            return Err(MountError::Twice(place(wish)));
        }
    }
    Ok(())
}

/// Writes a list as [`parse_list`] reads it.
#[must_use]
pub fn format_list(wishes: &[MountWish]) -> String {
    wishes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_survives_the_way_there_and_back() {
        for (text, written) in [
            ("home", "home"),
            ("none,workdir", "none,workdir"),
            ("/data", "/data"),
            ("/data/:ro", "/data:ro"),
            ("/data//x/./y:/in:rw", "/data/x/y:/in"),
            ("/a:/b:ro, /c", "/a:/b:ro,/c"),
            ("/tmp:/scratch/tmp", "/tmp:/scratch/tmp"),
        ] {
            let wishes = parse_list(text).unwrap();
            assert_eq!(format_list(&wishes), written);
            assert_eq!(parse_list(written).unwrap(), wishes);
        }
    }

    #[test]
    fn what_is_no_plain_path_or_hides_the_guest_is_refused_by_name() {
        for text in ["", "data", "./data", "/a/../b", "/a:b/c:ro", "/a\nb", "/a:/b:ro:x", "~/x"] {
            assert!(parse_list(text).is_err(), "{text:?}");
        }
        assert_eq!(parse_list("/a:rx"), Err(MountError::Mode("rx".into())));
        for target in ["/", "/usr", "/proc", "/proc/x", "/dev/shm", "/run/slurm-vm", "/tmp"] {
            let refused = parse_list(&format!("/data:{target}")).unwrap_err();
            assert_eq!(refused, MountError::Guests(target.into()));
        }
        assert!(parse_list("/usr/local/apps,/running").is_ok());
        assert_eq!(parse_list("/a,/b:/a"), Err(MountError::Twice("/a".into())));
        assert_eq!(parse_list("home,home"), Err(MountError::Twice("home".into())));
        let many: Vec<String> = (0..9).map(|i| format!("/d{i}")).collect();
        assert_eq!(parse_list(&many.join(",")), Err(MountError::TooMany));
    }
}
