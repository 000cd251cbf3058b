//! Which directories of the host a VM sees, and where: decided once, when its run is prepared, and the same wherever it goes.
//!
//! The site gives the home and the working directory to every job, or not (`[files]`); the user adds and takes away (`--vm-mount`).
//! What lies below another directory at the same place is not given a second time. A directory that cannot be given refuses the job
//! before anything boots: a program that writes its results into its working directory must not find another one there.
use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use slurm_vm_api::mount::{self, Mount, MountWish};

/// A directory of the host that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// By what the guest knows the device: `slurm-vm-0`, `slurm-vm-1`.
    pub tag: String,
    /// On the host.
    pub source: PathBuf,
    /// In the guest.
    pub target: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
}

impl fmt::Display for Directory {
    /// As `--vm-mount` has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mount = Mount {
            source: self.source.display().to_string(),
            target: self.target.display().to_string(),
            readonly: self.readonly,
        };
        MountWish::Directory(mount).fmt(f)
    }
}

/// What tells a directory from another one of the same path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// What stands in the VM's file in it; none where the user may not write there.
    pub nonce: Option<String>,
    /// Its inode and the time of its last change, as stat(1) prints them.
    pub look: String,
}

/// What a VM's directories are chosen from.
#[derive(Debug, Clone, Copy)]
pub struct Wishes<'a> {
    /// The site gives every job its user's home.
    pub site_home: bool,
    /// The site gives every job its working directory.
    pub site_workdir: bool,
    /// Below one of these must be what a user names; anything may be named where there is none.
    pub allowed: &'a [PathBuf],
    /// The user's home; empty where the host knows none.
    pub home: &'a str,
    /// The job's working directory; none where Slurm does not say.
    pub workdir: Option<&'a str>,
    /// What the user said.
    pub user: &'a [MountWish],
    /// The user has named another directory to run in (`--vm-workdir`).
    pub elsewhere: bool,
}

/// The directories of a VM, outer ones before those that are mounted below them.
///
/// # Errors
/// Which one cannot be given, and why, as a fragment.
pub fn choose(wishes: &Wishes<'_>) -> Result<Vec<Directory>, String> {
    let none = wishes.user.contains(&MountWish::None);
    let asked = |word: &MountWish| wishes.user.contains(word);
    let mut chosen: Vec<Mount> = Vec::new();
    for wish in wishes.user {
        if let MountWish::Directory(mount) = wish {
            let source = Path::new(&mount.source);
            if !wishes.allowed.is_empty() && !wishes.allowed.iter().any(|dir| source.starts_with(dir)) {
                return Err(format!(
                    "{} may not be given to a guest here: the site allows what is below {}",
                    mount.source,
                    wishes
                        .allowed
                        .iter()
                        .map(|d| d.display().to_string())
                        .collect::<Vec<_>>()
                        .join(", ")
                ));
            }
            chosen.push(mount.clone());
        }
    }
    if asked(&MountWish::Home) || (wishes.site_home && !none) {
        add(&mut chosen, "home", wishes.home)?;
    }
    let by_site = wishes.site_workdir && !none;
    if asked(&MountWish::Workdir) || by_site {
        let dir = wishes.workdir.ok_or("Slurm does not say what the job's working directory is")?;
        // The guest has a directory of that name, and the program goes on there as it would on the host.
        let added = if dir == "/" {
            Ok(())
        } else {
            add(&mut chosen, "working directory", dir)
        };
        // Who runs elsewhere does not need what only the site gives.
        if !wishes.elsewhere || asked(&MountWish::Workdir) {
            added.map_err(|why| format!("{why}; or name a directory of the guest with --vm-workdir"))?;
        }
    }
    if chosen.len() > mount::MAX_MOUNTS {
        return Err(format!(
            "{} directories are more than the {} that a guest can have",
            chosen.len(),
            mount::MAX_MOUNTS
        ));
    }
    if let Some(dir) = wishes.workdir.filter(|dir| *dir != "/" && !wishes.elsewhere && !chosen.is_empty())
        && !chosen.iter().any(|m| Path::new(dir).starts_with(&m.target))
    {
        return Err(format!(
            "the working directory {dir} is not among the directories that the guest sees: add workdir to --vm-mount, or name one in the \
             guest with --vm-workdir"
        ));
    }
    chosen.sort_by_key(|m| m.target.matches('/').count());
    Ok(chosen
        .into_iter()
        .enumerate()
        .map(|(i, m)| Directory {
            tag: format!("slurm-vm-{i}"),
            source: m.source.into(),
            target: m.target.into(),
            readonly: m.readonly,
        })
        .collect())
}

/// Adds a directory at its own place, unless it is seen there already.
fn add(chosen: &mut Vec<Mount>, what: &str, dir: &str) -> Result<(), String> {
    let bad = |why: String| format!("the {what} {dir} cannot be given to the guest: {why}");
    let dir = mount::plain_path(dir).map_err(|e| bad(e.to_string()))?;
    mount::check_target(&dir).map_err(|_| bad("the guest has a directory of its own there".into()))?;
    // Or the user wants something else at this place.
    if chosen.iter().any(|m| shows(m, &dir) || m.target == dir) {
        return Ok(());
    }
    // What was added before and lies below this one is seen through it.
    chosen.retain(|m| !(m.source == m.target && !m.readonly && Path::new(&m.target).starts_with(&dir)));
    chosen.push(Mount {
        source: dir.clone(),
        target: dir,
        readonly: false,
    });
    Ok(())
}

/// Whether a path of the host is seen at the same place of the guest through this mount.
fn shows(mount: &Mount, path: &str) -> bool {
    mount.source == mount.target && Path::new(path).starts_with(&mount.target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes<'a>(site: bool, user: &'a [MountWish], allowed: &'a [PathBuf]) -> Wishes<'a> {
        Wishes {
            site_home: site,
            site_workdir: site,
            allowed,
            home: "/home/a",
            workdir: Some("/home/a/job"),
            user,
            elsewhere: false,
        }
    }

    fn shown(wishes: &Wishes<'_>) -> Result<Vec<String>, String> {
        let line = |d: Directory| {
            let mode = if d.readonly { " ro" } else { "" };
            format!("{} {}>{}{mode}", d.tag, d.source.display(), d.target.display())
        };
        Ok(choose(wishes)?.into_iter().map(line).collect())
    }

    #[test]
    fn the_site_gives_and_the_user_adds_and_takes_away() {
        let of = |site: bool, text: &str| {
            let user = if text.is_empty() {
                vec![]
            } else {
                mount::parse_list(text).unwrap()
            };
            shown(&wishes(site, &user, &[]))
        };
        assert_eq!(of(false, ""), Ok(vec![]));
        assert_eq!(of(true, ""), Ok(vec!["slurm-vm-0 /home/a>/home/a".to_owned()]));
        assert_eq!(of(true, "none"), Ok(vec![]));
        assert!(of(true, "none,/data").unwrap_err().contains("working directory /home/a/job"));
        assert_eq!(of(true, "none,workdir"), Ok(vec!["slurm-vm-0 /home/a/job>/home/a/job".to_owned()]));
        assert_eq!(of(false, "workdir,home"), Ok(vec!["slurm-vm-0 /home/a>/home/a".to_owned()]));
        assert_eq!(
            of(true, "/data:/home/a/in:ro,/data"),
            Ok(vec![
                "slurm-vm-0 /data>/data".to_owned(),
                "slurm-vm-1 /home/a>/home/a".to_owned(),
                "slurm-vm-2 /data>/home/a/in ro".to_owned()
            ])
        );
        assert_eq!(
            of(true, "/data:/home/a"),
            Ok(vec![
                "slurm-vm-0 /data>/home/a".to_owned(),
                "slurm-vm-1 /home/a/job>/home/a/job".to_owned()
            ])
        );
    }

    #[test]
    fn what_cannot_be_given_is_named() {
        let mut asked = wishes(true, &[], &[]);
        asked.workdir = Some("/etc");
        let refused = choose(&asked).unwrap_err();
        assert!(
            refused.contains("working directory /etc") && refused.contains("--vm-workdir"),
            "{refused}"
        );
        asked.elsewhere = true;
        assert_eq!(shown(&asked), Ok(vec!["slurm-vm-0 /home/a>/home/a".to_owned()]));
        asked.elsewhere = false;
        asked.workdir = None;
        assert!(choose(&asked).unwrap_err().contains("Slurm does not say"));
        asked.workdir = Some("/");
        assert_eq!(shown(&asked), Ok(vec!["slurm-vm-0 /home/a>/home/a".to_owned()]));
        asked.home = "";
        assert!(choose(&asked).unwrap_err().contains("home"));
        let user = mount::parse_list("/etc:/in").unwrap();
        let allowed = [PathBuf::from("/scratch")];
        assert!(choose(&wishes(false, &user, &allowed)).unwrap_err().contains("/scratch"));
    }
}
