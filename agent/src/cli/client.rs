//! One question to an agent: a line of JSON there, lines of JSON back.
use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use slurm_vm_api::query::{Answer, Ask, AskLine};
use thiserror::Error;

/// No answer of an agent takes longer but those that follow something.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer that is accepted.
const MAX_LINE: u64 = 16 << 20;

/// Why the agent does not answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no agent answers at {path}: {source}; run svm on a compute node with slurm-vmd or on the controller's host, \
         `systemctl status slurm-vmd` says more"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It listens and says nothing.
    #[error("the agent at {path} does not answer: {source}; `systemctl status slurm-vmd` says more")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It speaks another language.
    #[error("the agent at {path} gives an answer that is not understood ({source}): is svm of the same version as slurm-vmd?")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// The reason.
        source: serde_json::Error,
    },
}

/// A question under way.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Asks.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn ask(path: &Path, ask: Ask) -> Result<Self, ClientError> {
        let fail = |source| ClientError::Connect {
            path: path.to_owned(),
            source,
        };
        let endless = matches!(ask, Ask::Log { follow: true, .. } | Ask::Migrate { .. });
        let mut stream = UnixStream::connect(path).map_err(fail)?;
        stream.set_read_timeout((!endless).then_some(PATIENCE)).map_err(fail)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
        let mut line = serde_json::to_vec(&AskLine { v: 1, ask }).map_err(|e| fail(e.into()))?;
        line.push(b'\n');
        stream.write_all(&line).map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
        })
    }

    /// The next answer; the last is [`Answer::Done`] or [`Answer::Refused`].
    ///
    /// # Errors
    /// When the agent closes before the end, is silent, or is of another version.
    pub fn answer(&mut self) -> Result<Answer, ClientError> {
        let mut line = Vec::new();
        let fail = |source| ClientError::Silent {
            path: self.path.clone(),
            source,
        };
        (&mut self.stream).take(MAX_LINE).read_until(b'\n', &mut line).map_err(|e| {
            fail(if e.kind() == io::ErrorKind::WouldBlock {
                io::Error::new(io::ErrorKind::TimedOut, "timed out")
            } else {
                e
            })
        })?;
        if line.last() != Some(&b'\n') {
            return Err(fail(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it closed the connection before the end of its answer",
            )));
        }
        serde_json::from_slice(&line).map_err(|source| ClientError::Answer {
            path: self.path.clone(),
            source,
        })
    }
}
