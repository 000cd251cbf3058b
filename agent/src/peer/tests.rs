//! The channel as two agents see it: who gets in, who does not, and that bytes arrive as they left.

use super::tls::hex;
use super::*;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const KEY: &str = "the cluster's key";
const SOON: Duration = Duration::from_secs(20);

/// Answers with who asked and what.
struct Echo;

impl Handler for Echo {
    type Question = String;
    type Answer = (String, u32, String);

    fn answer(&self, from: &Who, question: String) -> Self::Answer {
        (from.node.clone(), from.uid, question)
    }
}

fn settings(node: &str) -> PeerSettings {
    PeerSettings {
        handshake_deadline: SOON,
        connect_deadline: SOON,
        idle: SOON,
        ..PeerSettings::new(node, Role::Node, vec![0, 500])
    }
}

fn peer_with(settings: PeerSettings, credentials: impl Credentials + 'static) -> Arc<Peer> {
    Arc::new(Peer::new(settings, Arc::new(credentials)).unwrap())
}

fn peer(node: &str) -> Arc<Peer> {
    peer_with(settings(node), FakeCredentials::new(KEY, 500))
}

struct Node {
    server: PeerServer,
    moves: Arc<OpenMoves>,
    at: PeerAddress,
}

fn serve(peer: Arc<Peer>) -> Node {
    let moves = Arc::new(OpenMoves::default());
    let node = peer.settings.node.clone();
    let server = PeerServer::start(peer, TcpListener::bind("127.0.0.1:0").unwrap(), Arc::clone(&moves), Arc::new(Echo)).unwrap();
    let at = PeerAddress {
        node,
        host: "127.0.0.1".into(),
        port: server.address().port(),
    };
    Node { server, moves, at }
}

fn ask(peer: &Peer, at: &PeerAddress, question: &str) -> Result<(String, u32, String), PeerError> {
    peer.connect(at)?.ask(&question, SOON)
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !is() {
        assert!(Instant::now() < until, "{what}: not within {SOON:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn two_agents_trust_each_other_and_questions_are_answered_in_turn() {
    let n2 = serve(peer("n2"));
    let n1 = peer("n1");
    let mut session = n1.connect(&n2.at).unwrap();
    assert_eq!(
        *session.who(),
        Who {
            node: "n2".into(),
            role: Role::Node,
            uid: 500,
            version: 1,
            term: 0
        }
    );
    for i in 0..20 {
        let question = format!("question {i}");
        assert_eq!(
            session.ask::<_, (String, u32, String)>(&question, SOON).unwrap(),
            ("n1".into(), 500, question)
        );
    }
    session.close();
}

#[test]
fn a_peer_with_another_key_is_refused_and_learns_nothing() {
    let n2 = serve(peer("n2"));
    let stranger = peer_with(settings("n1"), FakeCredentials::new("another key", 0));
    assert!(matches!(ask(&stranger, &n2.at, "let me in"), Err(PeerError::Refused { .. })));
    // The other way round: a server with another key is refused by the client, even if it lets everybody in.
    let false_n2 = serve(peer_with(settings("n2"), Lenient(FakeCredentials::new("another key", 0))));
    assert!(matches!(
        ask(&peer("n1"), &false_n2.at, "who are you"),
        Err(PeerError::Credential(CredentialError::Bad(_)))
    ));
}

/// Believes all credentials of the right key, and signs with its own.
#[derive(Debug)]
struct Lenient(FakeCredentials);

impl Credentials for Lenient {
    fn encode(&self, payload: &[u8]) -> Result<String, CredentialError> {
        self.0.encode(payload)
    }

    fn decode(&self, credential: &str) -> Result<Decoded, CredentialError> {
        FakeCredentials::new(KEY, 0).decode(credential)
    }
}

#[test]
fn an_ordinary_user_of_the_cluster_is_refused_although_munge_vouches_for_him() {
    let n2 = serve(peer("n2"));
    let user = peer_with(settings("n1"), FakeCredentials::new(KEY, 2001));
    assert!(matches!(ask(&user, &n2.at, "let me in"), Err(PeerError::Refused { reason }) if reason == "not trusted"));
    let false_n2 = serve(peer_with(settings("n2"), FakeCredentials::new(KEY, 2001)));
    assert!(matches!(ask(&peer("n1"), &false_n2.at, "hello"), Err(PeerError::NotTrusted { reason }) if reason.contains("uid 2001")));
}

#[test]
fn a_node_that_is_not_the_one_wanted_is_left_alone() {
    let n2 = serve(peer("n2"));
    let wanted = PeerAddress {
        node: "n3".into(),
        ..n2.at.clone()
    };
    assert!(matches!(ask(&peer("n1"), &wanted, "hello"), Err(PeerError::NotTrusted { reason }) if reason.contains("n2, not n3")));
}

#[test]
fn a_credential_that_is_too_old_is_refused() {
    let n2 = serve(peer_with(
        settings("n2"),
        FakeCredentials {
            age_s: 301,
            ..FakeCredentials::new(KEY, 500)
        },
    ));
    assert!(matches!(ask(&peer("n1"), &n2.at, "hello"), Err(PeerError::Refused { .. })));
}

/// Changes what is signed, or signs nothing new at all: an attacker who got hold of genuine credentials.
#[derive(Debug)]
struct Forger {
    honest: FakeCredentials,
    edit: fn(&mut serde_json::Value),
    replay: Mutex<Option<String>>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Forger {
    fn new(edit: fn(&mut serde_json::Value)) -> Self {
        Self {
            honest: FakeCredentials::new(KEY, 500),
            edit,
            replay: Mutex::new(None),
            seen: Arc::default(),
        }
    }
}

impl Credentials for Forger {
    fn encode(&self, payload: &[u8]) -> Result<String, CredentialError> {
        if let Some(old) = self.replay.lock().unwrap().clone() {
            return Ok(old);
        }
        let mut claims = serde_json::from_slice(payload).unwrap();
        (self.edit)(&mut claims);
        let credential = self.honest.encode(&serde_json::to_vec(&claims).unwrap())?;
        self.seen.lock().unwrap().push(credential.clone());
        Ok(credential)
    }

    fn decode(&self, credential: &str) -> Result<Decoded, CredentialError> {
        self.honest.decode(credential)
    }
}

type Edit = fn(&mut serde_json::Value);

#[test]
fn a_credential_for_anything_but_this_connection_is_refused_on_both_sides() {
    let edits: [(&str, Edit); 9] = [
        ("fingerprint", |c| c["client_fingerprint"] = hex(&Sha256::digest("mine")).into()),
        ("fingerprint", |c| c["server_fingerprint"] = hex(&Sha256::digest("mine")).into()),
        ("nonce", |c| c["client_nonce"] = "00".repeat(32).into()),
        ("nonce", |c| c["server_nonce"] = "00".repeat(32).into()),
        ("channel", |c| c["channel"] = "00".repeat(32).into()),
        ("purpose", |c| c["purpose"] = "relay".into()),
        ("side", |c| {
            c["side"] = if c["side"] == "client" { "server" } else { "client" }.into();
        }),
        ("node or role", |c| c["client_node"] = "n9".into()),
        ("protocol", |c| c["version"] = 7.into()),
    ];
    let n2 = serve(peer("n2"));
    for (what, edit) in edits {
        let forger = peer_with(settings("n1"), Forger::new(edit));
        assert!(
            matches!(ask(&forger, &n2.at, "hello"), Err(PeerError::Refused { .. })),
            "{what}: the server must refuse"
        );
        let false_n2 = serve(peer_with(settings("n2"), Forger::new(edit)));
        match ask(&peer("n1"), &false_n2.at, "hello") {
            Err(PeerError::NotTrusted { reason }) => assert!(reason.contains(what), "{reason}"),
            other => panic!("{what}: the client must refuse: {other:?}"),
        }
    }
    let garbage: Edit = |c| *c = "a credential for some other service".into();
    assert!(matches!(
        ask(&peer_with(settings("n1"), Forger::new(garbage)), &n2.at, "hello"),
        Err(PeerError::Refused { .. })
    ));
}

#[test]
fn a_credential_seen_once_is_worth_nothing_in_another_connection() {
    let n2 = serve(peer("n2"));
    let forger = Forger::new(|_| ());
    let seen = Arc::clone(&forger.seen);
    let honest_once = peer_with(settings("n1"), forger);
    ask(&honest_once, &n2.at, "hello").unwrap();
    let stolen = seen.lock().unwrap()[0].clone();
    let replayer = Forger {
        replay: Mutex::new(Some(stolen)),
        ..Forger::new(|_| ())
    };
    assert!(matches!(
        ask(&peer_with(settings("n1"), replayer), &n2.at, "hello"),
        Err(PeerError::Refused { .. })
    ));
}

#[test]
fn a_man_in_the_middle_who_ends_tls_himself_is_found_out() {
    // He takes n1's connection with a certificate of his own, opens another to n2, and passes every message on: the credentials are genuine.
    let n2 = serve(peer("n2"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let middle = PeerAddress {
        node: "n2".into(),
        host: "127.0.0.1".into(),
        port: listener.local_addr().unwrap().port(),
    };
    let real = n2.at.clone();
    let man = thread::spawn(move || {
        let tls = tls::Tls::new().unwrap();
        let mut victim = tls.accept(listener.accept().unwrap().0, SOON).unwrap();
        let mut target = tls
            .connect(TcpStream::connect((real.host.as_str(), real.port)).unwrap(), SOON)
            .unwrap();
        for _ in 0..2 {
            let m: serde_json::Value = frame::receive(&mut victim, 1 << 16, "t", SOON).unwrap();
            frame::send(&mut target, &m, 1 << 16, "t", SOON).unwrap();
            let m: serde_json::Value = frame::receive(&mut target, 1 << 16, "t", SOON).unwrap();
            frame::send(&mut victim, &m, 1 << 16, "t", SOON).unwrap();
        }
    });
    assert!(matches!(ask(&peer("n1"), &middle, "hello"), Err(PeerError::Refused { .. })));
    man.join().unwrap();
}

#[test]
fn a_client_without_a_certificate_or_without_tls_does_not_get_in() {
    let n2 = serve(peer_with(
        PeerSettings {
            handshake_deadline: Duration::from_secs(2),
            ..settings("n2")
        },
        FakeCredentials::new(KEY, 500),
    ));
    let mut raw = TcpStream::connect((n2.at.host.as_str(), n2.at.port)).unwrap();
    raw.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    raw.set_read_timeout(Some(SOON)).unwrap();
    // An alert or nothing, and then the end.
    let mut answer = Vec::new();
    let _ = raw.read_to_end(&mut answer);
    assert!(answer.len() < 64);
    ask(&peer("n1"), &n2.at, "still there").unwrap();
}

#[test]
fn a_silent_peer_is_given_up_at_the_deadline_on_either_side() {
    let quick = |node| PeerSettings {
        handshake_deadline: Duration::from_millis(200),
        ..settings(node)
    };
    let n2 = serve(peer_with(quick("n2"), FakeCredentials::new(KEY, 500)));
    let mut silent = TcpStream::connect((n2.at.host.as_str(), n2.at.port)).unwrap();
    silent.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap_or(0), 0, "the server hangs up");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = PeerAddress {
        node: "n2".into(),
        host: "127.0.0.1".into(),
        port: listener.local_addr().unwrap().port(),
    };
    let n1 = peer_with(quick("n1"), FakeCredentials::new(KEY, 500));
    assert!(matches!(n1.connect(&mute), Err(PeerError::Deadline { .. })));
}

#[test]
fn a_peer_that_drips_bytes_does_not_stretch_the_deadline() {
    let n2 = serve(peer_with(
        PeerSettings {
            handshake_deadline: Duration::from_millis(300),
            ..settings("n2")
        },
        FakeCredentials::new(KEY, 500),
    ));
    let mut drip = TcpStream::connect((n2.at.host.as_str(), n2.at.port)).unwrap();
    let began = Instant::now();
    // The head of a record of 16 KiB, and then a byte now and then until the server has had enough.
    let _ = drip.write_all(&[22, 3, 1, 0x40, 0]);
    while drip.write_all(&[0]).is_ok() {
        assert!(began.elapsed() < SOON, "the server still listens");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_oversize_message_is_refused_before_memory_is_taken() {
    let n2 = serve(peer_with(
        PeerSettings {
            max_message: 1000,
            ..settings("n2")
        },
        FakeCredentials::new(KEY, 500),
    ));
    let mut session = peer("n1").connect(&n2.at).unwrap();
    assert!(
        session.ask::<_, (String, u32, String)>(&"x".repeat(2000), SOON).is_err(),
        "the server hangs up"
    );
    let mut session = peer("n1").connect(&n2.at).unwrap();
    let stream = session.stream();
    stream.write_all(&u32::MAX.to_be_bytes()).and_then(|()| stream.flush()).unwrap();
    assert!(session.ask::<_, (String, u32, String)>(&"x", SOON).is_err());
    let small = peer_with(
        PeerSettings {
            max_message: 10,
            ..settings("n1")
        },
        FakeCredentials::new(KEY, 500),
    );
    let mut session = small.connect(&n2.at).unwrap();
    assert!(matches!(
        session.ask::<_, (String, u32, String)>(&"x".repeat(20), SOON),
        Err(PeerError::Oversize { len: 22, max: 10 })
    ));
}

#[test]
fn more_connections_than_allowed_are_closed_and_the_others_live_on() {
    let n2 = serve(peer_with(
        PeerSettings {
            max_connections: 2,
            ..settings("n2")
        },
        FakeCredentials::new(KEY, 500),
    ));
    let n1 = peer("n1");
    let mut first = n1.connect(&n2.at).unwrap();
    let second = n1.connect(&n2.at).unwrap();
    assert!(n1.connect(&n2.at).is_err());
    assert!(first.ask::<_, (String, u32, String)>(&"still there?", SOON).is_ok());
    second.close();
    wait_until("a place is free again", || n1.connect(&n2.at).is_ok());
}

#[test]
fn stopping_the_server_cuts_its_sessions() {
    let mut n2 = serve(peer("n2"));
    let mut session = peer("n1").connect(&n2.at).unwrap();
    n2.server.stop();
    assert!(session.ask::<_, (String, u32, String)>(&"hello", SOON).is_err());
    assert!(peer("n1").connect(&n2.at).is_err());
}

/// A move from n1 to n2 with a target for each kind of stream.
struct Move {
    n2: Node,
    open: Option<OpenMove>,
    relay: RelayListener,
    targets: HashMap<StreamKind, UnixListener>,
    _dirs: (tempfile::TempDir, MoveDir),
}

fn start_move(encrypt: bool, allow_plain: bool, change: impl FnOnce(&mut MoveTicket)) -> Move {
    let temp = tempfile::tempdir().unwrap();
    let n2 = serve(peer_with(
        PeerSettings {
            allow_plain,
            ..settings("n2")
        },
        FakeCredentials::new(KEY, 500),
    ));
    let n1 = peer("n1");
    let (here, there) = (temp.path().join("n1"), temp.path().join("n2"));
    std::fs::create_dir(&here).unwrap();
    std::fs::create_dir(&there).unwrap();
    let dir = MoveDir::create(&there, "job-7", Access::default()).unwrap();
    let targets: HashMap<_, _> = StreamKind::ALL
        .iter()
        .map(|k| (*k, UnixListener::bind(dir.socket(*k)).unwrap()))
        .collect();
    let token = n1.new_token().unwrap();
    let paths = StreamKind::ALL.iter().map(|k| (*k, dir.socket(*k))).collect();
    let mut ticket = MoveTicket {
        id: "job-7".into(),
        token: token.clone(),
        from: "n1".into(),
        targets: paths,
    };
    change(&mut ticket);
    let open = Some(n2.moves.open(ticket));
    let spec = RelaySpec {
        id: "job-7".into(),
        token,
        to: n2.at.clone(),
        root: here,
        access: Access::default(),
        encrypt,
    };
    let relay = RelayListener::open(n1, spec).unwrap();
    Move {
        n2,
        open,
        relay,
        targets,
        _dirs: (temp, dir),
    }
}

impl Move {
    fn connect(&self, kind: StreamKind) -> UnixStream {
        let s = UnixStream::connect(self.relay.socket(kind)).unwrap();
        s.set_read_timeout(Some(SOON)).unwrap();
        s
    }

    fn accept(&self, kind: StreamKind) -> UnixStream {
        let s = self.targets[&kind].accept().unwrap().0;
        s.set_read_timeout(Some(SOON)).unwrap();
        s
    }

    /// True if a connection comes to its end without having reached anything.
    fn is_refused(&self, kind: StreamKind) -> bool {
        let mut s = self.connect(kind);
        let refused = s.read(&mut [0]).unwrap_or(0) == 0;
        self.targets[&kind].set_nonblocking(true).unwrap();
        refused && self.targets[&kind].accept().is_err()
    }
}

/// Bytes that differ everywhere and are the same each time.
fn noise(bytes: usize, seed: u64) -> impl FnMut(&mut [u8]) -> usize {
    let (mut left, mut state) = (bytes, seed | 1);
    move |buffer| {
        let n = buffer.len().min(left);
        for chunk in buffer[..n].chunks_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
        }
        left -= n;
        n
    }
}

fn send_noise(mut to: &UnixStream, bytes: usize, seed: u64) {
    let (mut next, mut buffer) = (noise(bytes, seed), vec![0; 1 << 16]);
    loop {
        match next(&mut buffer) {
            0 => break,
            n => to.write_all(&buffer[..n]).unwrap(),
        }
    }
    to.shutdown(Shutdown::Write).unwrap();
}

fn expect_noise(mut from: &UnixStream, bytes: usize, seed: u64) {
    let (mut next, mut got, mut want, mut total) = (noise(bytes, seed), vec![0; 1 << 16], vec![0; 1 << 16], 0);
    while total < bytes {
        let n = (bytes - total).min(1 << 16);
        from.read_exact(&mut got[..n]).unwrap();
        let m = next(&mut want[..n]);
        assert!(m == n && got[..n] == want[..n], "differs within {n} bytes from {total}");
        total += n;
    }
    assert_eq!(from.read(&mut [0]).unwrap(), 0, "and then the end");
}

/// 200 MB one way, 20 MB the other, at the same time; the ends of both directions arrive. Returns MB/s of the large direction.
fn carries_everything(encrypt: bool) -> f64 {
    const BULK: usize = 200_000_003;
    let m = start_move(encrypt, true, |_| ());
    let source = m.connect(StreamKind::Migration);
    let target = m.accept(StreamKind::Migration);
    let began = Instant::now();
    thread::scope(|s| {
        s.spawn(|| send_noise(&source, BULK, 1));
        s.spawn(|| send_noise(&target, BULK / 10, 2));
        s.spawn(|| expect_noise(&source, BULK / 10, 2));
        expect_noise(&target, BULK, 1);
    });
    let rate = BULK as f64 / 1e6 / began.elapsed().as_secs_f64();
    assert_eq!(m.relay.progress().bytes(StreamKind::Migration), (BULK as u64, BULK as u64 / 10));
    assert_eq!(
        m.open.as_ref().unwrap().progress().bytes(StreamKind::Migration),
        (BULK as u64 / 10, BULK as u64)
    );
    rate
}

#[test]
fn two_hundred_megabytes_arrive_byte_for_byte_encrypted() {
    println!("encrypted: {:.0} MB/s", carries_everything(true));
}

#[test]
fn two_hundred_megabytes_arrive_byte_for_byte_in_the_clear() {
    println!("in the clear: {:.0} MB/s", carries_everything(false));
}

#[test]
fn an_end_of_one_direction_is_passed_on_and_the_other_goes_on() {
    for encrypt in [true, false] {
        let m = start_move(encrypt, true, |_| ());
        let mut source = m.connect(StreamKind::Disk);
        let mut target = m.accept(StreamKind::Disk);
        source.write_all(b"last words").unwrap();
        source.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        target.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "last words");
        target.write_all(b"and the answer to them").unwrap();
        drop(target);
        heard.clear();
        source.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "and the answer to them", "encrypt {encrypt}");
    }
}

#[test]
fn what_travels_is_encrypted_unless_both_sides_want_it_in_the_clear() {
    // A tap between the two agents.
    for (encrypt, kind, visible) in [
        (true, StreamKind::Migration, false),
        (false, StreamKind::Migration, true),
        (false, StreamKind::Libvirt, false),
    ] {
        let m = start_move(encrypt, true, |_| ());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tapped = PeerAddress {
            port: listener.local_addr().unwrap().port(),
            ..m.n2.at.clone()
        };
        let real = m.n2.at.port;
        let tap = thread::spawn(move || {
            let mut from = listener.accept().unwrap().0;
            let mut to = TcpStream::connect(("127.0.0.1", real)).unwrap();
            let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
            let back = thread::spawn(move || {
                let _ = std::io::copy(&mut back_from, &mut back_to);
                let _ = back_to.shutdown(Shutdown::Write);
            });
            let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                seen.extend_from_slice(&buffer[..n]);
                to.write_all(&buffer[..n]).unwrap();
            }
            let _ = to.shutdown(Shutdown::Write);
            back.join().unwrap();
            seen
        });
        let temp = tempfile::tempdir().unwrap();
        let token = "t".repeat(64);
        let paths = StreamKind::ALL.iter().map(|k| (*k, m._dirs.1.socket(*k))).collect();
        let _open = m.n2.moves.open(MoveTicket {
            id: "job-8".into(),
            token: token.clone(),
            from: "n1".into(),
            targets: paths,
        });
        let spec = RelaySpec {
            id: "job-8".into(),
            token,
            to: tapped,
            root: temp.path().into(),
            access: Access::default(),
            encrypt,
        };
        let relay = RelayListener::open(peer("n1"), spec).unwrap();
        let mut source = UnixStream::connect(relay.socket(kind)).unwrap();
        let mut target = m.accept(kind);
        source.write_all(b"a page of the guest's memory").unwrap();
        drop(source);
        let mut heard = String::new();
        target.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "a page of the guest's memory");
        drop(target);
        let seen = tap.join().unwrap();
        assert_eq!(seen.windows(7).any(|w| w == b"guest's"), visible, "{kind:?}, encrypt {encrypt}");
        assert!(
            !seen.windows(64).any(|w| w == "t".repeat(64).as_bytes()),
            "the secret is never in the clear"
        );
    }
}

#[test]
fn a_stream_is_refused_when_the_move_is_not_open_or_not_as_agreed() {
    let mut closed = start_move(true, false, |_| ());
    closed.open = None;
    assert!(closed.is_refused(StreamKind::Migration), "no move is open");
    assert!(
        start_move(true, false, |t| t.id = "job-9".into()).is_refused(StreamKind::Migration),
        "another move"
    );
    assert!(
        start_move(true, false, |t| t.token.replace_range(0..1, "x")).is_refused(StreamKind::Migration),
        "another secret"
    );
    assert!(
        start_move(true, false, |t| t.from = "n3".into()).is_refused(StreamKind::Migration),
        "another source"
    );
    assert!(
        start_move(true, false, |t| drop(t.targets.remove(&StreamKind::Disk))).is_refused(StreamKind::Disk),
        "a kind that was not agreed"
    );
    assert!(
        start_move(false, false, |_| ()).is_refused(StreamKind::Migration),
        "in the clear, and the destination does not allow it"
    );
    let gone = start_move(true, false, |_| ());
    let path = gone._dirs.1.socket(StreamKind::Disk);
    std::fs::remove_file(path).unwrap();
    assert!(gone.is_refused(StreamKind::Disk), "nobody listens there");
}

#[test]
fn closing_the_move_on_either_side_cuts_its_streams() {
    for destination in [true, false] {
        for encrypt in [true, false] {
            let mut m = start_move(encrypt, true, |_| ());
            let mut source = m.connect(StreamKind::Migration);
            let mut target = m.accept(StreamKind::Migration);
            source.write_all(b"x").unwrap();
            target.read_exact(&mut [0]).unwrap();
            if destination {
                m.open = None;
            } else {
                let dir = m.relay.socket(StreamKind::Disk).parent().unwrap().to_owned();
                drop(m.relay);
                assert!(!dir.exists(), "the directory goes with the move");
            }
            assert_eq!(source.read(&mut [0]).unwrap_or(0), 0);
            assert_eq!(target.read(&mut [0]).unwrap_or(0), 0);
        }
    }
}

#[test]
fn a_move_directory_is_private_and_a_stale_one_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let temp = tempfile::tempdir().unwrap();
    let stale = temp.path().join("job-7");
    std::fs::create_dir(&stale).unwrap();
    drop(UnixListener::bind(stale.join("libvirt.sock")).unwrap());
    let dir = MoveDir::create(temp.path(), "job-7", Access::default()).unwrap();
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir.path()), 0o700);
    assert!(!dir.socket(StreamKind::Libvirt).exists());
    let shared = MoveDir::create(
        temp.path(),
        "job-8",
        Access {
            dir_mode: 0o770,
            ..Access::default()
        },
    )
    .unwrap();
    assert_eq!(mode(shared.path()), 0o770);
    for bad in ["", ".", "..", "a/b", "../x", ".x", &"x".repeat(65)] {
        assert!(MoveDir::create(temp.path(), bad, Access::default()).is_err(), "{bad}");
    }
    let path = dir.path().to_owned();
    drop(dir);
    assert!(!path.exists());
}

#[test]
fn the_sockets_of_a_move_belong_to_qemu_and_nobody_else_gets_in() {
    use std::os::unix::fs::MetadataExt;
    if !nix::unistd::geteuid().is_root() {
        return println!("not root: owners cannot be set");
    }
    let temp = tempfile::tempdir().unwrap();
    let access = Access {
        uid: Some(64055),
        gid: Some(64056),
        ..Access::default()
    };
    let to = PeerAddress {
        node: "n2".into(),
        host: "127.0.0.1".into(),
        port: 1,
    };
    let spec = RelaySpec {
        id: "job-7".into(),
        token: String::new(),
        to,
        root: temp.path().into(),
        access,
        encrypt: true,
    };
    let relay = RelayListener::open(peer("n1"), spec).unwrap();
    let of = |p: &Path| std::fs::symlink_metadata(p).map(|m| (m.uid(), m.gid(), m.mode() & 0o777)).unwrap();
    assert_eq!(of(&temp.path().join("job-7")), (64055, 64056, 0o700));
    for kind in StreamKind::ALL {
        assert_eq!(of(&relay.socket(kind)), (64055, 64056, 0o600));
    }
    // The peer is not there: the local connection ends, and the relay lives on.
    let mut s = UnixStream::connect(relay.socket(StreamKind::Migration)).unwrap();
    s.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(s.read(&mut [0]).unwrap_or(0), 0);
    drop(relay);
    assert!(!temp.path().join("job-7").exists());
}

#[test]
fn munge_itself_vouches_for_us_where_a_daemon_runs() {
    // SLURM_VM_TEST_MUNGE names the socket of a munged; without one there is nothing to test against here.
    let Some(socket) = std::env::var_os("SLURM_VM_TEST_MUNGE") else {
        return println!("no munged given: not tested");
    };
    let munge = || Munge {
        socket: Some(socket.clone().into()),
    };
    let uid = nix::unistd::geteuid().as_raw();
    let credential = munge().encode(b"payload").unwrap();
    let decoded = munge().decode(&credential).unwrap();
    assert_eq!((decoded.payload.as_slice(), decoded.uid), (b"payload".as_slice(), uid));
    assert!((0..5).contains(&decoded.age_s));
    assert!(
        matches!(munge().decode(&credential), Err(CredentialError::Bad(_))),
        "munged itself refuses a replay"
    );
    assert!(matches!(munge().decode("MUNGE:AwQFAAC:"), Err(CredentialError::Bad(_))));
    assert!(matches!(
        Munge {
            socket: Some("/nosuch/socket".into())
        }
        .encode(b"x"),
        Err(CredentialError::Daemon(_))
    ));
    let own = |node: &str| PeerSettings {
        allowed_uids: vec![uid],
        ..settings(node)
    };
    let n2 = serve(peer_with(own("n2"), munge()));
    assert_eq!(
        ask(&peer_with(own("n1"), munge()), &n2.at, "hello").unwrap(),
        ("n1".into(), uid, "hello".into())
    );
}
