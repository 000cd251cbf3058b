//! The host's user database, as the agent asks it: names, homes and groups of a uid that Slurm or the kernel attests.
//! What a client says of itself is not asked for.
use std::ffi::CString;

use nix::unistd::{Gid, Uid, User, getgrouplist};
use slurm_vm_api::session::UserEntry;

/// The line of a uid, with the group that Slurm gives its job. A uid that the host does not know has its number for a name.
#[must_use]
pub fn entry(uid: u32, gid: u32) -> UserEntry {
    let known = User::from_uid(Uid::from_raw(uid))
        .inspect_err(|e| log::warn!("the user database does not tell uid {uid}: {e}"))
        .ok()
        .flatten();
    UserEntry {
        name: known.as_ref().map_or_else(|| uid.to_string(), |u| u.name.clone()),
        uid,
        gid,
        home: known.as_ref().map_or_else(String::new, |u| u.dir.to_string_lossy().into_owned()),
        shell: known.map_or_else(String::new, |u| u.shell.to_string_lossy().into_owned()),
    }
}

/// The supplementary groups of a user; only the job's own group where the host does not tell others.
#[must_use]
pub fn groups(user: &UserEntry) -> Vec<u32> {
    let mine = Gid::from_raw(user.gid);
    let listed = User::from_uid(Uid::from_raw(user.uid)).and_then(|known| {
        // By the name that the database has now: a record may be of another day.
        let name = known.and_then(|u| CString::new(u.name).ok());
        name.map_or_else(|| Ok(vec![mine]), |name| getgrouplist(&name, mine))
    });
    match listed {
        Ok(groups) => groups.into_iter().map(Gid::as_raw).collect(),
        Err(e) => {
            log::warn!("the user database does not tell the groups of uid {}: {e}", user.uid);
            vec![user.gid]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_in_the_group_of_the_job_and_in_no_group_of_roots() {
        let daemon = entry(1, 4711);
        assert_eq!((daemon.name.as_str(), daemon.uid, daemon.gid), ("daemon", 1, 4711));
        let groups = groups(&daemon);
        assert!(groups.contains(&4711) && !groups.contains(&0), "{groups:?}");
    }

    #[test]
    fn a_uid_that_the_host_does_not_know_has_its_number_for_a_name_and_one_group() {
        let nobody = entry(3_999_999_999, 17);
        assert_eq!(nobody.name, "3999999999");
        assert_eq!(groups(&nobody), [17]);
    }
}
