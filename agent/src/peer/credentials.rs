//! Credentials: who made these bytes, as the cluster's MUNGE key attests. A trait, so that tests need no daemon.

use super::error::CredentialError;
use sha2::{Digest, Sha256};

/// A credential that was found to be genuine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// What was signed.
    pub payload: Vec<u8>,
    /// The effective uid of the process that asked its munged to sign.
    pub uid: u32,
    /// The same for the group.
    pub gid: u32,
    /// Seconds between signing and now, by the two hosts' clocks; negative if theirs is ahead.
    pub age_s: i64,
}

/// Makes and checks credentials.
pub trait Credentials: Send + Sync + std::fmt::Debug {
    /// Signs, as the user that this process runs as.
    ///
    /// # Errors
    /// If the daemon is not there.
    fn encode(&self, payload: &[u8]) -> Result<String, CredentialError>;

    /// Checks and opens.
    ///
    /// # Errors
    /// If the daemon is not there, or the credential is not genuine, too old, or was used before.
    fn decode(&self, credential: &str) -> Result<Decoded, CredentialError>;
}

/// Credentials without a daemon, for tests and the simulation: genuine for those that share the key, without protection against replay (so that tests see ours).
#[derive(Debug, Clone)]
pub struct FakeCredentials {
    /// The cluster's key.
    pub key: String,
    /// As whom to sign.
    pub uid: u32,
    /// What to claim as age when decoding.
    pub age_s: i64,
}

impl FakeCredentials {
    /// Signs as `uid` with `key`.
    #[must_use]
    pub fn new(key: &str, uid: u32) -> Self {
        Self {
            key: key.to_owned(),
            uid,
            age_s: 0,
        }
    }

    fn tag(&self, uid: u32, payload: &str) -> String {
        super::tls::hex(&Sha256::digest(format!("{}:{uid}:{payload}:{}", self.key, self.key)))
    }
}

impl Credentials for FakeCredentials {
    fn encode(&self, payload: &[u8]) -> Result<String, CredentialError> {
        let payload = super::tls::hex(payload);
        Ok(format!("FAKE:{}:{payload}:{}", self.uid, self.tag(self.uid, &payload)))
    }

    fn decode(&self, credential: &str) -> Result<Decoded, CredentialError> {
        let bad = || CredentialError::Bad("not one of ours".into());
        let parts: Vec<&str> = credential.split(':').collect();
        let ["FAKE", uid, payload, tag] = parts[..] else {
            return Err(bad());
        };
        let uid: u32 = uid.parse().map_err(|_| bad())?;
        if self.tag(uid, payload) != tag {
            return Err(bad());
        }
        let bytes = (0..payload.len() / 2)
            .map(|i| u8::from_str_radix(&payload[2 * i..2 * i + 2], 16).map_err(|_| bad()))
            .collect::<Result<_, _>>()?;
        Ok(Decoded {
            payload: bytes,
            uid,
            gid: uid,
            age_s: self.age_s,
        })
    }
}
