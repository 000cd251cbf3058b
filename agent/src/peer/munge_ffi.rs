//! libmunge, as little of it as is needed: a context with a time to live, encode, decode. See munge(3).

use super::credentials::{Credentials, Decoded};
use super::error::CredentialError;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::ptr;

#[expect(
    non_camel_case_types,
    non_upper_case_globals,
    dead_code,
    unused_imports,
    reason = "made by bindgen"
)]
mod c {
    include!(concat!(env!("OUT_DIR"), "/munge.rs"));
}

#[link(name = "munge")]
unsafe extern "C" {}

/// Seconds for which a credential of ours can be decoded. The handshake takes less than five; the rest is for clocks that differ.
const TTL_S: c_int = 120;

/// The cluster's MUNGE daemon.
#[derive(Debug, Clone, Default)]
pub struct Munge {
    /// Its socket; `None` is the compiled-in one.
    pub socket: Option<PathBuf>,
}

/// A `munge_ctx_t` that is destroyed at the end of the scope.
struct Context(c::munge_ctx_t);

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `new` made the context and checked that it is not null; nobody else has a copy, and drop runs once.
        unsafe { c::munge_ctx_destroy(self.0) }
    }
}

impl Context {
    fn new(munge: &Munge) -> Result<Self, CredentialError> {
        // SAFETY: takes no arguments; null (out of memory) is checked below.
        let raw = unsafe { c::munge_ctx_create() };
        if raw.is_null() {
            return Err(CredentialError::Daemon("out of memory".into()));
        }
        let context = Self(raw);
        if let Some(socket) = &munge.socket {
            let path = CString::new(socket.as_os_str().as_encoded_bytes())
                .map_err(|_| CredentialError::Daemon("the socket's name has a NUL".into()))?;
            // SAFETY: MUNGE_OPT_SOCKET takes a NUL-terminated string, which libmunge copies; `path` lives until after the call, the context is alive.
            let err = unsafe { c::munge_ctx_set(context.0, c::munge_opt_MUNGE_OPT_SOCKET as _, path.as_ptr()) };
            context.check(err)?;
        }
        Ok(context)
    }

    fn check(&self, err: c::munge_err_t) -> Result<(), CredentialError> {
        if err == c::munge_err_EMUNGE_SUCCESS {
            return Ok(());
        }
        // SAFETY: both return null or a NUL-terminated string: the first belongs to the context, which is alive and not used before the copy, the second is static.
        let text = unsafe {
            let own = c::munge_ctx_strerror(self.0);
            let text = if own.is_null() { c::munge_strerror(err) } else { own };
            if text.is_null() {
                String::new()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Err(match err {
            c::munge_err_EMUNGE_SOCKET | c::munge_err_EMUNGE_TIMEOUT | c::munge_err_EMUNGE_NO_MEMORY | c::munge_err_EMUNGE_SNAFU => {
                CredentialError::Daemon(text)
            }
            _ => CredentialError::Bad(text),
        })
    }

    fn time(&self, option: c::munge_opt) -> Result<i64, CredentialError> {
        let mut time: libc::time_t = 0;
        // SAFETY: the two options asked for by `decode` (ENCODE_TIME, DECODE_TIME) write one time_t through the pointer; `time` is one and outlives the call.
        let err = unsafe { c::munge_ctx_get(self.0, option as _, ptr::from_mut(&mut time)) };
        self.check(err)?;
        Ok(time)
    }
}

/// Memory that libmunge allocated with malloc and handed to us.
struct Malloced<T>(*mut T);

impl<T> Drop for Malloced<T> {
    fn drop(&mut self) {
        // SAFETY: libmunge's contract is that the caller frees it with free(); null is allowed there, and nobody else has a copy.
        unsafe { libc::free(self.0.cast()) }
    }
}

impl Credentials for Munge {
    fn encode(&self, payload: &[u8]) -> Result<String, CredentialError> {
        let context = Context::new(self)?;
        // SAFETY: MUNGE_OPT_TTL takes an int by value; the context is alive.
        let err = unsafe { c::munge_ctx_set(context.0, c::munge_opt_MUNGE_OPT_TTL as _, TTL_S) };
        context.check(err)?;
        let len = c_int::try_from(payload.len()).map_err(|_| CredentialError::Bad("the payload is too long".into()))?;
        let mut credential = Malloced::<c_char>(ptr::null_mut());
        // SAFETY: `payload` is readable for `len` bytes and not kept; on success the pointer is set to a malloced, NUL-terminated string, else left null.
        let err = unsafe { c::munge_encode(&raw mut credential.0, context.0, payload.as_ptr().cast::<c_void>(), len) };
        context.check(err)?;
        if credential.0.is_null() {
            return Err(CredentialError::Daemon("it gave no credential".into()));
        }
        // SAFETY: not null, NUL-terminated (see above), alive until `credential` is dropped at the end of this function.
        Ok(unsafe { CStr::from_ptr(credential.0) }.to_string_lossy().into_owned())
    }

    fn decode(&self, credential: &str) -> Result<Decoded, CredentialError> {
        let text = CString::new(credential).map_err(|_| CredentialError::Bad("it has a NUL".into()))?;
        let context = Context::new(self)?;
        let mut buffer = Malloced::<c_void>(ptr::null_mut());
        let (mut len, mut uid, mut gid): (c_int, libc::uid_t, libc::gid_t) = (0, 0, 0);
        // SAFETY: `text` is NUL-terminated and not kept; all out-pointers point to live locals of the C types; `buffer` is set to malloced memory of `len` bytes or null.
        let err = unsafe {
            c::munge_decode(
                text.as_ptr(),
                context.0,
                &raw mut buffer.0,
                &raw mut len,
                &raw mut uid,
                &raw mut gid,
            )
        };
        // libmunge also fills in the results for expired and replayed credentials: nothing is looked at before the verdict is success.
        context.check(err)?;
        let payload = match usize::try_from(len) {
            Ok(len) if len > 0 && !buffer.0.is_null() => {
                // SAFETY: libmunge says that `len` bytes are there, and they live until `buffer` is dropped at the end of this function.
                unsafe { std::slice::from_raw_parts(buffer.0.cast::<u8>(), len) }.to_vec()
            }
            _ => Vec::new(),
        };
        let age_s = context.time(c::munge_opt_MUNGE_OPT_DECODE_TIME)? - context.time(c::munge_opt_MUNGE_OPT_ENCODE_TIME)?;
        Ok(Decoded { payload, uid, gid, age_s })
    }
}
