//! The core against guests that are slow, forgetful or hostile.

use slurm_vm_api::frame::Kind;
use slurm_vm_api::guest::{ProgramReport, Scope, StartReport, put_data, put_mark};

use super::*;

fn decode(bytes: &[u8]) -> Vec<ToGuest> {
    let (mut decoder, mut input, mut found) = (Decoder::new(), bytes, Vec::new());
    while let Some(frame) = decoder.next(&mut input) {
        if frame.kind == Kind::Control {
            found.push(serde_json::from_slice(frame.body).unwrap());
        }
    }
    found
}

struct Pair {
    core: LinkCore,
    now: Instant,
}

impl Pair {
    fn new() -> Self {
        let mut pair = Self {
            core: LinkCore::new(40),
            now: Instant::now(),
        };
        pair.core.connected(pair.now);
        pair
    }

    fn sent(&mut self) -> Vec<ToGuest> {
        let mut out = Vec::new();
        self.core.fill(&mut out, self.now);
        decode(&out)
    }

    fn says(&mut self, message: &ToHost) {
        let mut wire = Vec::new();
        guest::put_control(&mut wire, message).unwrap();
        self.core.received(&wire, self.now);
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) {
        let mut wire = Vec::new();
        put_data(&mut wire, 1, Stream::Stdout, offset, [bytes, &[]]).unwrap();
        self.core.received(&wire, self.now);
    }

    fn hello(&mut self, programs: Vec<ProgramReport>) {
        let nonce = self.sent().into_iter().find_map(|message| {
            if let ToGuest::Hello { nonce, .. } = message {
                Some(nonce)
            } else {
                None
            }
        });
        self.hello_with(nonce.expect("a hello was sent"), programs);
    }

    fn hello_with(&mut self, nonce: u64, programs: Vec<ProgramReport>) {
        let text = String::new;
        self.says(&ToHost::Hello(GuestHello {
            protocol: PROTOCOL,
            nonce,
            boot_id: text(),
            instance: text(),
            version: text(),
            kernel: text(),
            hostname: text(),
            bad_frames: 0,
            programs,
        }));
    }

    fn events(&mut self) -> Vec<LinkEvent> {
        std::iter::from_fn(|| self.core.event()).collect()
    }
}

fn running(end: u64) -> ProgramReport {
    ProgramReport {
        program: 1,
        state: ProgramState::Running,
        report: StartReport::default(),
        stdin_consumed: 0,
        streams: vec![StreamReport {
            stream: Stream::Stdout,
            start: 0,
            end,
            eof: false,
            ring_bytes: 4096,
        }],
    }
}

fn following() -> Pair {
    let mut pair = Pair::new();
    pair.core.request(LinkRequest::Resume {
        program: 1,
        stream: Stream::Stdout,
        from: 0,
    });
    pair.hello(vec![running(0)]);
    pair.sent();
    pair.events();
    pair
}

#[test]
fn nothing_is_believed_before_the_answer_to_our_own_hello() {
    let mut pair = Pair::new();
    pair.core.request(LinkRequest::Resume {
        program: 1,
        stream: Stream::Stdout,
        from: 0,
    });
    pair.data(0, b"stale");
    pair.hello_with(7, vec![running(0)]);
    assert_eq!(pair.events(), []);
    pair.hello(vec![running(0)]);
    assert!(matches!(pair.events()[..], [LinkEvent::Up { .. }]));
    assert_eq!(
        pair.sent(),
        [ToGuest::Resume {
            program: 1,
            stream: Stream::Stdout,
            from: 0
        }]
    );
}

#[test]
fn a_guest_that_sends_beyond_its_window_is_dropped() {
    let mut pair = following();
    pair.data(0, &[1; 4096]);
    assert_eq!(pair.core.broken(), None);
    pair.data(4096, b"x");
    assert!(pair.core.broken().is_some());
    assert!(matches!(pair.events().last(), Some(LinkEvent::Violation { .. })));
    let mut pair = following();
    pair.data(0, &[1; 4096]);
    pair.core.request(LinkRequest::Ack {
        program: 1,
        stream: Stream::Stdout,
        offset: 4096,
    });
    pair.data(4096, b"x");
    assert_eq!(pair.core.broken(), None);
}

#[test]
fn a_gap_is_asked_for_once_and_an_overlap_is_trimmed() {
    let mut pair = following();
    pair.data(0, b"abc");
    pair.data(5, b"xyz");
    pair.data(8, b"xyz");
    assert_eq!(
        pair.sent(),
        [ToGuest::Resume {
            program: 1,
            stream: Stream::Stdout,
            from: 3
        }]
    );
    pair.data(1, b"bcdef");
    let bytes: Vec<(u64, Vec<u8>)> = pair
        .events()
        .into_iter()
        .filter_map(|e| {
            if let LinkEvent::Data { offset, bytes, .. } = e {
                Some((offset, bytes))
            } else {
                None
            }
        })
        .collect();
    assert_eq!(bytes, [(0, b"abc".to_vec()), (3, b"def".to_vec())]);
}

#[test]
fn the_end_is_told_after_all_output_whichever_arrives_first() {
    let mut pair = following();
    let mut ended = running(6);
    ended.streams[0].eof = true;
    pair.says(&ToHost::Exited {
        program: 1,
        status: ExitStatus::Code { code: 0 },
        streams: ended.streams,
    });
    pair.data(0, b"abc");
    assert!(!pair.events().iter().any(|event| matches!(event, LinkEvent::Exited { .. })));
    pair.data(3, b"def");
    let mut wire = Vec::new();
    put_mark(&mut wire, Kind::Eof, 1, Stream::Stdout, 6).unwrap();
    pair.core.received(&wire, pair.now);
    assert!(matches!(
        pair.events()[..],
        [LinkEvent::Data { .. }, LinkEvent::Eof { offset: 6, .. }, LinkEvent::Exited { .. }]
    ));
}

#[test]
fn a_request_keeps_its_id_over_a_break_and_a_clock_setting_is_not_repeated() {
    let mut pair = following();
    pair.core.request(LinkRequest::Do {
        token: 5,
        action: Action::Signal {
            program: 1,
            signo: 15,
            scope: Scope::All,
        },
    });
    pair.core.request(LinkRequest::Do {
        token: 6,
        action: Action::SetClock { unix_ns: 1 },
    });
    let first = pair.sent();
    pair.core.disconnected("test");
    pair.core.connected(pair.now + HELLO_PAUSE);
    pair.now += HELLO_PAUSE;
    pair.hello(vec![running(0)]);
    let again: Vec<ToGuest> = pair
        .sent()
        .into_iter()
        .filter(|message| matches!(message, ToGuest::Request { .. }))
        .collect();
    assert_eq!(again, first[..1]);
    let done: Vec<u64> = pair
        .events()
        .into_iter()
        .filter_map(|e| if let LinkEvent::Done { token, .. } = e { Some(token) } else { None })
        .collect();
    assert_eq!(done, [6]);
}

#[test]
fn a_damaged_frame_begins_a_new_session_but_not_without_end() {
    let mut pair = following();
    for _ in 0..100 {
        pair.core.received(b"\x05rubbish\0", pair.now);
    }
    assert_eq!(pair.sent(), [], "not before the pause is over");
    pair.now += HELLO_PAUSE;
    assert!(matches!(pair.sent()[..], [ToGuest::Hello { .. }]));
    assert_eq!(pair.core.broken(), None);
}

#[test]
fn a_guest_of_another_protocol_is_told_apart() {
    let mut pair = Pair::new();
    pair.sent();
    let text = String::new;
    pair.says(&ToHost::Hello(GuestHello {
        protocol: 0,
        nonce: 41,
        boot_id: text(),
        instance: text(),
        version: text(),
        kernel: text(),
        hostname: text(),
        bad_frames: 0,
        programs: vec![],
    }));
    assert_eq!(pair.events(), [LinkEvent::Incompatible { protocol: 0 }]);
    assert!(pair.core.broken().is_some());
}
