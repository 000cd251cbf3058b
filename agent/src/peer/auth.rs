//! Who is there: four messages inside TLS.
//!
//! ```text
//! client -> server   Hello  { versions, node, role, purpose, nonce_client }
//! server -> client   Hello  { versions, node, role, purpose, nonce_server }
//! client -> server   Proof  { credential over Claims{side: client, ...} }
//! server -> client   Answer { credential over Claims{side: server, ...} }  or a refusal
//! ```
//! A credential is a MUNGE credential whose payload, [`Claims`], names *this* connection: protocol, version, side, purpose, both nodes and roles, both nonces, the
//! fingerprints of both certificates, and a value exported from the TLS session. The receiver makes the claims it expects out of what it saw itself and compares;
//! then it checks the uid that MUNGE attests, and the age.
//! * **Replay** fails: the nonces and the exported value are of another connection.
//! * **A man in the middle** fails: he shows certificates of his own, so the fingerprints that the two ends saw differ from those that they signed.
//! * **Reflection** (sending a side's own credential back to it) fails: the side is in it. **Use for another purpose** fails: the purpose is in it.
//! * **The client proves first.** A server gives no credential to strangers, since a credential of a privileged user is worth something to other services that look
//!   at the uid only. The client's goes to the address of a node that it chose.

use super::credentials::Credentials;
use super::error::PeerError;
use super::frame;
use super::tls::{Tls, TlsStream};
use crate::effects::Faults;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Versions that this program speaks: n and n-1.
pub const VERSIONS: (u32, u32) = (1, 1);

/// Fault point: armed to fail, the accepting side speaks versions of which the agents of nodes know none.
pub const HANDSHAKE_VERSION: &str = "handshake.version";

/// Handshake messages are about 1 KiB; MUNGE credentials grow by a third over their payload.
const MAX_MESSAGE: usize = 16 << 10;

/// Oldest credential that is taken, whatever its own time to live says. The nonces give freshness; this only bounds what a broken clock can do.
const MAX_AGE_S: i64 = 300;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Questions and orders between agents.
    Request,
    /// One stream of a move.
    Relay,
}

/// As what a process takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The agent of a node.
    Node,
    /// The controller.
    Controller,
    /// An administrator's tool.
    Tool,
}

/// Who is on the other side, as proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    /// The node it says it is. As true as everybody with the cluster's MUNGE key and an allowed uid is honest.
    pub node: String,
    /// As what.
    pub role: Role,
    /// The uid that MUNGE attests.
    pub uid: u32,
    /// The version agreed on.
    pub version: u32,
    /// Its [`PeerSettings::term`](super::PeerSettings::term): of two controllers the one that began later has the higher one.
    pub term: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    protocol: String,
    versions: (u32, u32),
    node: String,
    role: Role,
    purpose: Purpose,
    nonce: String,
    term: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proof {
    credential: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Answer {
    Accepted { credential: String },
    Refused { reason: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Side {
    Client,
    Server,
}

/// What a credential says. Compared as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claims {
    protocol: String,
    version: u32,
    side: Side,
    purpose: Purpose,
    client_node: String,
    client_role: Role,
    client_term: u64,
    server_node: String,
    server_role: Role,
    client_nonce: String,
    server_nonce: String,
    client_fingerprint: String,
    server_fingerprint: String,
    channel: String,
}

impl Claims {
    /// The first thing that differs, for the log.
    fn difference(&self, other: &Self) -> Option<&'static str> {
        let checks = [
            ("protocol", self.protocol != other.protocol || self.version != other.version),
            ("side", self.side != other.side),
            ("purpose", self.purpose != other.purpose),
            (
                "fingerprint",
                self.client_fingerprint != other.client_fingerprint || self.server_fingerprint != other.server_fingerprint,
            ),
            (
                "nonce",
                self.client_nonce != other.client_nonce || self.server_nonce != other.server_nonce,
            ),
            ("channel", self.channel != other.channel),
            ("node or role", self != other),
        ];
        checks.iter().find(|(_, differs)| *differs).map(|(what, _)| *what)
    }
}

/// What both sides bring to a handshake.
#[derive(Debug)]
pub(super) struct Party<'a> {
    pub tls: &'a Tls,
    pub credentials: &'a dyn Credentials,
    pub node: &'a str,
    pub role: Role,
    pub term: u64,
    pub allowed_uids: &'a [u32],
    pub deadline: Duration,
    pub faults: &'a Faults,
}

const PROTOCOL: &str = "slurm-vm-peer";
const WHAT: &str = "prove who is who";

impl Party<'_> {
    fn hello(&self, purpose: Purpose) -> Result<Hello, PeerError> {
        Ok(Hello {
            protocol: PROTOCOL.to_owned(),
            versions: VERSIONS,
            node: self.node.to_owned(),
            role: self.role,
            purpose,
            nonce: self.tls.random_hex(32)?,
            term: self.term,
        })
    }

    fn claims(&self, side: Side, client: &Hello, server: &Hello, stream: &TlsStream, i_am: Side) -> Result<Claims, PeerError> {
        let theirs = stream.peer_fingerprint().ok_or_else(|| not_trusted("it showed no certificate"))?;
        let ours = self.tls.fingerprint.clone();
        let (client_fingerprint, server_fingerprint) = if i_am == Side::Client { (ours, theirs) } else { (theirs, ours) };
        Ok(Claims {
            protocol: PROTOCOL.to_owned(),
            version: common_version(client, server)?,
            side,
            purpose: client.purpose,
            client_node: client.node.clone(),
            client_role: client.role,
            client_term: client.term,
            server_node: server.node.clone(),
            server_role: server.role,
            client_nonce: client.nonce.clone(),
            server_nonce: server.nonce.clone(),
            client_fingerprint,
            server_fingerprint,
            channel: stream.channel()?,
        })
    }

    fn sign(&self, claims: &Claims) -> Result<String, PeerError> {
        Ok(self.credentials.encode(&serde_json::to_vec(claims)?)?)
    }

    /// Opens the other side's credential and holds it against what it must say. Returns the uid.
    fn verify(&self, credential: &str, expected: &Claims) -> Result<u32, PeerError> {
        let decoded = self.credentials.decode(credential)?;
        let claims: Claims = serde_json::from_slice(&decoded.payload).map_err(|_| not_trusted("its credential is for something else"))?;
        if let Some(what) = claims.difference(expected) {
            return Err(not_trusted(&format!("its credential is for another {what}")));
        }
        if decoded.age_s.abs() > MAX_AGE_S {
            return Err(not_trusted(&format!("its credential is {} s old", decoded.age_s)));
        }
        if !self.allowed_uids.contains(&decoded.uid) {
            return Err(not_trusted(&format!("uid {} is not allowed to speak for a node", decoded.uid)));
        }
        Ok(decoded.uid)
    }

    /// The connecting side. `node` is whom it wants.
    pub(super) fn prove_to_server(&self, stream: &mut TlsStream, node: &str, purpose: Purpose) -> Result<Who, PeerError> {
        stream.set_deadline(self.deadline);
        let client = self.hello(purpose)?;
        frame::send(stream, &client, MAX_MESSAGE, WHAT, self.deadline)?;
        let server: Hello = frame::receive(stream, MAX_MESSAGE, WHAT, self.deadline)?;
        check_hello(&server)?;
        if server.node != node {
            return Err(not_trusted(&format!("it is {}, not {node}", server.node)));
        }
        let claims = self.claims(Side::Client, &client, &server, stream, Side::Client)?;
        frame::send(
            stream,
            &Proof {
                credential: self.sign(&claims)?,
            },
            MAX_MESSAGE,
            WHAT,
            self.deadline,
        )?;
        match frame::receive(stream, MAX_MESSAGE, WHAT, self.deadline)? {
            Answer::Refused { reason } => Err(PeerError::Refused {
                reason: reason.chars().take(400).collect(),
            }),
            Answer::Accepted { credential } => {
                let uid = self.verify(
                    &credential,
                    &Claims {
                        side: Side::Server,
                        ..claims.clone()
                    },
                )?;
                Ok(Who {
                    node: server.node,
                    role: server.role,
                    uid,
                    version: claims.version,
                    term: server.term,
                })
            }
        }
    }

    /// The accepting side.
    pub(super) fn prove_to_client(&self, stream: &mut TlsStream) -> Result<(Who, Purpose), PeerError> {
        stream.set_deadline(self.deadline);
        let client: Hello = frame::receive(stream, MAX_MESSAGE, WHAT, self.deadline)?;
        check_hello(&client)?;
        let mut server = self.hello(client.purpose)?;
        // An agent of a release that is too far away, as other nodes' agents see it: its controller still speaks its language.
        if client.role == Role::Node && self.faults.pass(HANDSHAKE_VERSION).is_err() {
            server.versions = (VERSIONS.1 + 1, VERSIONS.1 + 2);
        }
        frame::send(stream, &server, MAX_MESSAGE, WHAT, self.deadline)?;
        let expected = self.claims(Side::Client, &client, &server, stream, Side::Server)?;
        let proof: Proof = frame::receive(stream, MAX_MESSAGE, WHAT, self.deadline)?;
        let uid = match self.verify(&proof.credential, &expected) {
            Ok(uid) => uid,
            Err(e) => {
                // A stranger learns that it failed; why is in our log.
                let reason = if matches!(e, PeerError::Credential(_)) {
                    "the credential could not be checked"
                } else {
                    "not trusted"
                };
                let _ = frame::send(
                    stream,
                    &Answer::Refused { reason: reason.to_owned() },
                    MAX_MESSAGE,
                    WHAT,
                    self.deadline,
                );
                return Err(e);
            }
        };
        let version = expected.version;
        let credential = self.sign(&Claims {
            side: Side::Server,
            ..expected
        })?;
        frame::send(stream, &Answer::Accepted { credential }, MAX_MESSAGE, WHAT, self.deadline)?;
        Ok((
            Who {
                node: client.node,
                role: client.role,
                uid,
                version,
                term: client.term,
            },
            client.purpose,
        ))
    }
}

fn common_version(a: &Hello, b: &Hello) -> Result<u32, PeerError> {
    let version = a.versions.1.min(b.versions.1);
    if version < a.versions.0.max(b.versions.0) {
        return Err(PeerError::Version {
            ours: VERSIONS,
            theirs: if a.versions == VERSIONS { b.versions } else { a.versions },
        });
    }
    Ok(version)
}

fn check_hello(hello: &Hello) -> Result<(), PeerError> {
    let name_ok = !hello.node.is_empty()
        && hello.node.len() <= 255
        && hello
            .node
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if hello.protocol != PROTOCOL || hello.nonce.len() != 64 || !name_ok {
        return Err(not_trusted("it does not speak this protocol"));
    }
    Ok(())
}

fn not_trusted(reason: &str) -> PeerError {
    PeerError::NotTrusted { reason: reason.to_owned() }
}
