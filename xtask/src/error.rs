//! One error type for all of xtask: everything here ends as one line on a developer's terminal.

use std::path::PathBuf;

/// What went wrong, as a fragment that reads after "error: ".
#[derive(Debug)]
pub enum Error {
    /// A file operation failed; the path says on what.
    File {
        /// What was tried, e.g. `write`.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Anything else, with its remedy when there is one.
    Other(String),
    /// The user has ended it with Ctrl-C.
    Interrupted,
}

/// The result of everything in xtask that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { what, path, source } => write!(f, "cannot {what} {}: {source}", path.display()),
            Self::Other(text) => f.write_str(text),
            Self::Interrupted => f.write_str("ended by a signal"),
        }
    }
}

impl std::error::Error for Error {}

impl From<String> for Error {
    fn from(text: String) -> Self {
        Self::Other(text)
    }
}

impl From<&str> for Error {
    fn from(text: &str) -> Self {
        Self::Other(text.to_owned())
    }
}

/// Adds the path to an I/O result.
pub trait At<T> {
    /// `what` is a verb: "cannot {what} {path}: ...".
    fn at(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, what: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|e| Error::File {
            what,
            path: path.into(),
            source: e.into(),
        })
    }
}
