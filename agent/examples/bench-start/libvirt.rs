//! The base of the comparison: libvirt's own functions and nothing else.
#![expect(unsafe_code, reason = "calls C")]

use std::{
    ffi::{CString, c_char, c_int, c_uint, c_void},
    ptr::NonNull,
};

#[link(name = "virt")]
unsafe extern "C" {
    fn virConnectOpen(name: *const c_char) -> *mut c_void;
    fn virConnectClose(conn: *mut c_void) -> c_int;
    fn virDomainCreateXML(conn: *mut c_void, xml: *const c_char, flags: c_uint) -> *mut c_void;
    fn virDomainDestroy(domain: *mut c_void) -> c_int;
    fn virDomainFree(domain: *mut c_void) -> c_int;
    fn virDomainLookupByName(conn: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// A connection that is open all the time, as the agent's is.
#[derive(Debug)]
pub struct Connection(NonNull<c_void>);

impl Connection {
    /// Opens it.
    pub fn open(uri: &str) -> Result<Self, String> {
        let name = CString::new(uri).map_err(|e| e.to_string())?;
        // SAFETY: `name` is a C string that outlives the call.
        let conn = unsafe { virConnectOpen(name.as_ptr()) };
        NonNull::new(conn).map(Self).ok_or_else(|| format!("cannot connect to {uri}"))
    }

    /// The one call that starts a domain.
    pub fn create(&self, xml: &CString) -> Result<(), String> {
        // SAFETY: the connection is open as long as `self` lives, the text is a C string that outlives the call.
        let domain = unsafe { virDomainCreateXML(self.0.as_ptr(), xml.as_ptr(), 0) };
        if domain.is_null() {
            return Err("virDomainCreateXML failed".into());
        }
        // SAFETY: libvirt gave this reference to us, and it is not used again.
        unsafe { virDomainFree(domain) };
        Ok(())
    }

    /// Ends a domain if it is there.
    pub fn destroy(&self, name: &str) -> Result<(), String> {
        let text = CString::new(name).map_err(|e| e.to_string())?;
        // SAFETY: the connection is open, the text is a C string that outlives the call.
        let domain = unsafe { virDomainLookupByName(self.0.as_ptr(), text.as_ptr()) };
        if domain.is_null() {
            return Ok(());
        }
        // SAFETY: `domain` is a reference of ours, given back by the second call and not used after it.
        let done = unsafe {
            let done = virDomainDestroy(domain);
            virDomainFree(domain);
            done
        };
        if done == 0 { Ok(()) } else { Err(format!("cannot destroy {name}")) }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, closed once.
        unsafe { virConnectClose(self.0.as_ptr()) };
    }
}
