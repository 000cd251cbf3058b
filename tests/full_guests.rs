//! Images as a distribution makes them, with nothing of ours inside: files, network, exit code, and a preemption.
mod common;

use std::time::Instant;

use common::{
    WebServer,
    moves::{Mover, lab},
};
use xtask::Options;

/// What a program sees of the user, its place and its files: the same on the host and in a guest.
const SEES: &str = "#!/usr/bin/env python3
import os, pwd, sys
print(os.getuid(), os.getgid(), os.getcwd(), os.environ['HOME'])
print(pwd.getpwuid(os.getuid()).pw_name, os.access('/', os.W_OK))
with open(sys.argv[1], 'w') as file:
    file.write('first\\n')
with open(sys.argv[1], 'a') as file:
    file.write('second\\n')
os.mkdir(sys.argv[1] + '.d', 0o750)
os.rename(sys.argv[1], sys.argv[1] + '.d/file')
print(open(sys.argv[1] + '.d/file').read(), oct(os.stat(sys.argv[1] + '.d').st_mode))
print(os.uname().nodename, os.uname().release, file=sys.stderr)
sys.exit(3)
";

/// Fetches a file again and again over the network and counts into a file in the home; whole, however often it moves.
const WORKS: &str = "#!/usr/bin/env python3
import os, time, urllib.request
boot = open('/proc/sys/kernel/random/boot_id').read().strip()
done = open(os.environ['HOME'] + '/works.log', 'w')
for i in range(1, 61):
    for _ in range(20):
        try:
            word = urllib.request.urlopen('http://10.77.0.1:8000/guests/word', timeout=3).read().decode().strip()
            break
        except OSError:
            time.sleep(0.2)
    print(i, word, flush=True)
    print(i, file=done, flush=True)
    time.sleep(0.3)
print('same boot' if open('/proc/sys/kernel/random/boot_id').read().strip() == boot else 'another boot')
";

fn works_on(image: &str) {
    let options = Options {
        nodes: 2,
        companions: true,
        images: vec![image.into()],
        grace_s: 60,
        ..Options::default()
    };
    let lab = lab("guests", options);
    let _server = WebServer::on(&lab, "ctl", "10.77.0.1", 8000);
    let m = Mover::new(&lab, "guests", 2);
    m.t.script("sees.py", SEES);
    m.t.script("works.py", WORKS);
    m.t.script("word", "a-word");
    let plain = m.t.submit("-o plain -e plain.err sees.py host-file");
    assert_eq!(m.t.end_of(plain), ("FAILED".into(), "3:0".into()), "{}", m.t.text("plain.err"));
    let vm = format!("--vm={image} --mem=1400 -c2");
    let job = m.t.submit(&format!("{vm} -o guest -e guest.err sees.py guest-file"));
    assert_eq!(m.t.end_of(job), ("FAILED".into(), "3:0".into()), "{}", m.t.text("guest.err"));
    assert_eq!(m.t.text("guest"), m.t.text("plain"));
    assert!(
        m.t.text("guest.err").starts_with(&format!("slurm-{job}-0 ")),
        "{}",
        m.t.text("guest.err")
    );
    assert_eq!(m.t.text("guest-file.d/file"), "first\nsecond\n");

    // cloud-init grows what it finds, a while after the program could begin.
    let grown = m.t.submit(&format!(
        "{vm} --vm-disk=6G -o grown --wrap 'for i in $(seq 60); do df --output=size -BG / | grep -q 6G && break; sleep 1; done; df --output=size -BG /'"
    ));
    assert_eq!(m.t.end_of(grown).0, "COMPLETED");
    assert!(m.t.text("grown").contains("6G"), "{}", m.t.text("grown"));
    let small = m.t.submit(&format!("{vm} --vm-disk=1G -o small --wrap true"));
    m.t.end_of(small);
    assert!(
        m.t.text("small").contains("smaller than the disk of image"),
        "{}",
        m.t.text("small")
    );

    let job = m.t.submit(&format!("{vm} --vm-net=user -p low -w n1 -o works works.py"));
    m.wait_lines("works", 5);
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    m.completed(job, 1);
    assert_eq!(m.ways(job), ["live"]);
    let wanted: String = (1..=60).map(|i| format!("{i} a-word\n")).collect();
    assert_eq!(m.t.text("works"), wanted + "same boot\n");
    let log = std::fs::read_to_string(lab.shared().join("home/alice/works.log")).expect("the log");
    assert_eq!(log, (1..=60).map(|i| format!("{i}\n")).collect::<String>());
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_stock_debian_12_works_with_files_and_network_before_and_after_a_preemption() {
    works_on("debian12");
}

#[test]
fn a_stock_debian_13_works_with_files_and_network_before_and_after_a_preemption() {
    works_on("debian13");
}
