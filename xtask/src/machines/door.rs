//! Running a program on a machine: SSH to its daemon over a network card of its own that leads to the loopback of the cluster's namespace and
//! nowhere else. What happens on the cluster's network does not matter to it.

use super::{
    identity::key_file,
    options::{door, number},
};
use crate::{
    Result,
    error::At,
    lab::{PATH, Places, USERS, state},
    proc,
};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs,
    process::{Command, Stdio},
};

/// A command that runs `argv` on a machine as a user, in the user's home, with an environment of its own; its streams are the caller's.
pub fn command(places: &Places, host: &str, user: &str, argv: &[&str], terminal: bool) -> Result<Command> {
    if argv.is_empty() {
        return Err("no command given: put it behind --".into());
    }
    let mut line = String::new();
    let (name, home) = match USERS.iter().find(|u| u.name == user) {
        Some(user) => {
            let id = user.id;
            line = format!("exec setpriv --reuid={id} --regid={id} --init-groups ");
            (user.name, format!("/home/{}", user.name))
        }
        None if user == "root" => ("root", "/root".to_owned()),
        None => return Err(format!("unknown user {user}: root, alice, bob").into()),
    };
    let term = std::env::var("TERM").ok().filter(|_| terminal);
    let term = term.map_or_else(String::new, |t| format!(" TERM={}", quoted(&t)));
    line += &format!("env -i PATH={PATH} HOME={home} USER={name} LOGNAME={name} LANG=C.UTF-8 SHELL=/bin/bash{term}");
    for word in argv {
        line += " ";
        line += &quoted(word);
    }
    connection(places, host)?;
    let mut command = client(places, host)?;
    command.args(["-o", "ControlMaster=no"]);
    if terminal {
        command.arg("-tt");
    }
    command.arg("root@machine").arg("--").arg(format!("cd {home} && {line}"));
    Ok(command)
}

/// A word for sh, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn client(places: &Places, host: &str) -> Result<Command> {
    number(host)?;
    let pid = state::alive(places).ok_or_else(|| {
        let name = places.name();
        format!("there are no machines {name}: `cargo xtask machines up --name {name}`")
    })?;
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/proc/{pid}/ns/net"))
        .args(["ssh", "-F", "/dev/null", "-q", "-p", &door(host)?.to_string(), "-i"])
        .arg(key_file(places));
    let path = format!("ControlPath={}", places.host_socket(host).display());
    for option in [
        path.as_str(),
        "HostName=127.0.0.1",
        "BatchMode=yes",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "ConnectTimeout=15",
        "ServerAliveInterval=20",
        "ServerAliveCountMax=6",
    ] {
        command.args(["-o", option]);
    }
    Ok(command)
}

/// One connection carries all commands: to make one takes a machine under emulation a second. Not having it is no error here, but in the
/// command that comes next.
fn connection(places: &Places, host: &str) -> Result<()> {
    let lives = || -> Result<bool> {
        let mut check = client(places, host)?;
        check.args(["-O", "check", "root@machine"]);
        let status = check.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        Ok(status.at("run", "ssh")?.success())
    };
    if lives()? {
        return Ok(());
    }
    let path = places.host_socket(host).with_extension("lock");
    let file = fs::File::create(&path).at("create", &path)?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).at("lock", &path)?;
    if lives()? {
        return Ok(());
    }
    let _ = fs::remove_file(places.host_socket(host));
    let mut master = client(places, host)?;
    // Until the machine answers or refuses; then it goes on behind us, until the machine goes.
    master.args(["-o", "ControlMaster=yes", "-f", "-N", "root@machine"]);
    let _ = master.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    Ok(())
}

/// Runs a command to its end and gives what it wrote; anything but success is an error.
pub fn run(places: &Places, host: &str, argv: &[&str]) -> Result<String> {
    let output = command(places, host, "root", argv, false)?
        .stdin(Stdio::null())
        .output()
        .at("run", "ssh")?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!(
        "`{}` failed on {host} ({}): {}",
        argv.join(" "),
        output.status,
        proc::text_of(&output)
    )
    .into())
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn words_with_quotes_and_blanks_arrive_as_they_are() {
        let word = "a 'b' \"$c\"\n;";
        let out = std::process::Command::new("sh")
            .args(["-c", &format!("printf %s {}", quoted(word))])
            .output()
            .expect("sh");
        assert_eq!(String::from_utf8_lossy(&out.stdout), word);
    }
}
