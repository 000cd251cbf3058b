//! The one place that calls libvirt's C functions: thin safe wrappers, one per function that we use.
//!
//! What is held here so that the rest can be safe code:
//! * A [`Connection`] or [`Domain`] owns one reference of its C object and gives it back once, in `drop`. libvirt's objects may be used from any
//!   thread, and from several at a time.
//! * libvirt's last error is per thread: it is copied in the same function, before anything else is called.
//! * Strings and arrays that libvirt allocates are copied and freed in the function that got them.
use super::callbacks::{self, Sink};
use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr::{self, NonNull},
    sync::Once,
};
use uuid::Uuid;

/// What bindgen made of libvirt's headers.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    missing_debug_implementations,
    dead_code,
    clippy::all,
    clippy::pedantic
)]
#[allow(clippy::undocumented_unsafe_blocks, reason = "generated")]
pub(super) mod sys {
    include!(concat!(env!("OUT_DIR"), "/libvirt.rs"));

    // bindgen declares the functions; this names the library that has them.
    #[link(name = "virt")]
    unsafe extern "C" {}
}

/// An error as libvirt tells it.
#[derive(Debug, Clone)]
pub(super) struct VirError {
    /// The function that failed.
    pub call: &'static str,
    /// `virErrorNumber`.
    pub code: i32,
    /// `virErrorDomain`.
    pub domain: i32,
    /// The text.
    pub message: String,
}

impl VirError {
    /// Whether the error has this number.
    pub(super) fn is(&self, number: sys::virErrorNumber) -> bool {
        i64::from(self.code) == i64::from(number)
    }
}

type R<T> = Result<T, VirError>;

/// The value of a typed parameter.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Any integer that is not negative, and true as 1.
    Number(u64),
    /// A negative integer or a fraction: nothing that we read.
    Odd,
    /// A text.
    Text(String),
}

/// Typed parameters that were read.
pub(super) type Values = Vec<(String, Value)>;

/// A number by name; 0 if it is not there.
pub(super) fn number(values: &Values, name: &[u8]) -> u64 {
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    values
        .iter()
        .find_map(|(n, v)| {
            if let Value::Number(v) = v
                && n.as_bytes() == name
            {
                Some(*v)
            } else {
                None
            }
        })
        .unwrap_or(0)
}

fn error(call: &'static str) -> VirError {
    // SAFETY: virGetLastError returns null or this thread's error object, which stays as it is until this thread calls libvirt again;
    // its message is null or a C string of the same life.
    unsafe {
        let e = sys::virGetLastError();
        if e.is_null() {
            return VirError {
                call,
                code: 0,
                domain: 0,
                message: "no reason given".into(),
            };
        }
        let message = if (*e).message.is_null() {
            "no reason given".into()
        } else {
            CStr::from_ptr((*e).message).to_string_lossy().into_owned()
        };
        VirError {
            call,
            code: (*e).code,
            domain: (*e).domain,
            message,
        }
    }
}

fn check(call: &'static str, rc: c_int) -> R<c_int> {
    if rc < 0 { Err(error(call)) } else { Ok(rc) }
}

fn c_string(call: &'static str, text: &str) -> R<CString> {
    CString::new(text).map_err(|_| VirError {
        call,
        code: 0,
        domain: 0,
        message: "a text with a zero byte in it".into(),
    })
}

/// CPUs as libvirt wants them: one bit for each, in bytes, the lowest first; and how many bytes.
fn cpu_map(cpus: &[u32]) -> (Vec<u8>, c_int) {
    let bytes = cpus.iter().max().map_or(1, |most| most / 8 + 1);
    let mut map = vec![0_u8; bytes as usize];
    for cpu in cpus {
        map[(cpu / 8) as usize] |= 1 << (cpu % 8);
    }
    (map, c_int::try_from(bytes).unwrap_or(c_int::MAX))
}

/// Copies and frees a string that libvirt allocated with malloc.
fn take_string(call: &'static str, text: *mut c_char) -> R<String> {
    if text.is_null() {
        return Err(error(call));
    }
    // SAFETY: the callers hand over a C string that libvirt allocated for its caller, not used by anyone else, to be freed with free().
    unsafe {
        let copy = CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        Ok(copy)
    }
}

/// The UUID of a domain object. Local: no request is sent.
///
/// # Safety
/// `domain` is null or points to a live domain object.
pub(super) unsafe fn identity(domain: sys::virDomainPtr) -> Option<(String, Uuid)> {
    let mut bytes = [0u8; 16];
    // SAFETY: a live domain by the caller's promise; virDomainGetUUID writes exactly 16 bytes; the name belongs to the domain object.
    unsafe {
        if domain.is_null() || sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) < 0 {
            return None;
        }
        let name = sys::virDomainGetName(domain);
        if name.is_null() {
            None
        } else {
            Some((CStr::from_ptr(name).to_string_lossy().into_owned(), Uuid::from_bytes(bytes)))
        }
    }
}

/// Copies typed parameters.
///
/// # Safety
/// `params` points to `count` parameters that libvirt filled.
pub(super) unsafe fn read_values(params: sys::virTypedParameterPtr, count: c_int) -> Values {
    let count = usize::try_from(count).unwrap_or(0);
    if params.is_null() || count == 0 {
        return Vec::new();
    }
    // SAFETY: the caller's promise.
    let params = unsafe { std::slice::from_raw_parts(params, count) };
    params
        .iter()
        .map(|p| {
            // SAFETY: libvirt ends the name with a zero byte, and `type_` says which member of the union is set; a string member is null or a C string.
            unsafe {
                let name = CStr::from_ptr(p.field.as_ptr()).to_string_lossy().into_owned();
                #[expect(clippy::cast_sign_loss, reason = "the enumeration has no negative values")]
                let value = match p.type_ as sys::virTypedParameterType {
                    sys::virTypedParameterType_VIR_TYPED_PARAM_INT => u64::try_from(p.value.i).map_or(Value::Odd, Value::Number),
                    sys::virTypedParameterType_VIR_TYPED_PARAM_UINT => Value::Number(p.value.ui.into()),
                    sys::virTypedParameterType_VIR_TYPED_PARAM_LLONG => u64::try_from(p.value.l).map_or(Value::Odd, Value::Number),
                    sys::virTypedParameterType_VIR_TYPED_PARAM_ULLONG => Value::Number(p.value.ul),
                    sys::virTypedParameterType_VIR_TYPED_PARAM_BOOLEAN => Value::Number(u64::from(p.value.b != 0)),
                    sys::virTypedParameterType_VIR_TYPED_PARAM_STRING if !p.value.s.is_null() => {
                        Value::Text(CStr::from_ptr(p.value.s).to_string_lossy().into_owned())
                    }
                    _ => Value::Odd,
                };
                (name, value)
            }
        })
        .collect()
}

/// Typed parameters to be handed to libvirt.
struct Params {
    list: sys::virTypedParameterPtr,
    count: c_int,
    capacity: c_int,
}

impl Params {
    /// `names` are libvirt's constants: byte strings with a zero byte at the end.
    fn new(call: &'static str, params: &[(&'static [u8], Param<'_>)]) -> R<Self> {
        let mut p = Self {
            list: ptr::null_mut(),
            count: 0,
            capacity: 0,
        };
        for (name, value) in params {
            let name = CStr::from_bytes_with_nul(name)
                .map_err(|_| VirError {
                    call,
                    code: 0,
                    domain: 0,
                    message: "a parameter name without its end".into(),
                })?
                .as_ptr();
            let (list, count, capacity) = (&raw mut p.list, &raw mut p.count, &raw mut p.capacity);
            // SAFETY: list, count and capacity belong together and are only changed by these functions, which copy name and value.
            let rc = unsafe {
                match value {
                    Param::Text(text) => {
                        let text = c_string(call, text)?;
                        sys::virTypedParamsAddString(list, count, capacity, name, text.as_ptr())
                    }
                    Param::Number(n) => sys::virTypedParamsAddULLong(list, count, capacity, name, *n),
                    Param::Int(n) => sys::virTypedParamsAddInt(list, count, capacity, name, *n),
                }
            };
            check(call, rc)?;
        }
        Ok(p)
    }
}

impl Drop for Params {
    fn drop(&mut self) {
        // SAFETY: the list was made by virTypedParamsAdd*, holds `count` entries, and is not used afterwards.
        unsafe { sys::virTypedParamsFree(self.list, self.count) };
    }
}

/// A typed parameter for libvirt.
#[derive(Debug, Clone, Copy)]
pub(super) enum Param<'a> {
    /// A C string.
    Text(&'a str),
    /// An unsigned long long.
    Number(u64),
    /// An int.
    Int(c_int),
}

/// Makes libvirt ready, once in a process: threads, its event loop, silence on stderr. Must come before the first connection.
pub(super) fn initialize() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: these have no precondition but that the event loop is registered before the first connection is opened, which only
        // Connection::open does, after this. The handler is a plain function that ignores its arguments.
        unsafe {
            sys::virInitialize();
            sys::virSetErrorFunc(ptr::null_mut(), Some(callbacks::ignore_error));
            if sys::virEventRegisterDefaultImpl() < 0 {
                log::error!("libvirt's event loop cannot be registered: no events, no keepalive");
                return;
            }
        }
        let spawned = std::thread::Builder::new().name("libvirt-events".into()).spawn(|| {
            loop {
                // SAFETY: the default implementation was registered above, and only this thread runs it.
                if unsafe { sys::virEventRunDefaultImpl() } < 0 {
                    log::warn!("libvirt's event loop: {}", error("virEventRunDefaultImpl").message);
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        });
        if let Err(e) = spawned {
            log::error!("libvirt's event loop has no thread: {e}");
        }
    });
}

/// A connection to libvirt.
#[derive(Debug)]
pub(super) struct Connection {
    ptr: NonNull<sys::_virConnect>,
    callbacks: Vec<c_int>,
    close_callback: bool,
}

// SAFETY: libvirt's connection objects are counted and locked inside: documented for use from several threads.
unsafe impl Send for Connection {}
// SAFETY: as above.
unsafe impl Sync for Connection {}

impl Connection {
    /// Opens a connection. Blocks for as long as the daemon takes to answer.
    pub(super) fn open(uri: &str) -> R<Self> {
        initialize();
        let uri = c_string("virConnectOpen", uri)?;
        // SAFETY: a C string that outlives the call; null is checked for.
        let ptr = NonNull::new(unsafe { sys::virConnectOpen(uri.as_ptr()) }).ok_or_else(|| error("virConnectOpen"))?;
        Ok(Self {
            ptr,
            callbacks: Vec::new(),
            close_callback: false,
        })
    }

    fn raw(&self) -> sys::virConnectPtr {
        self.ptr.as_ptr()
    }

    /// Has libvirt send a sign of life every `interval` seconds and close the connection after `count` of them without an answer.
    /// `false`: this driver has none (it lives in our process).
    pub(super) fn keep_alive(&self, interval_s: i32, count: u32) -> R<bool> {
        // SAFETY: a live connection.
        match check("virConnectSetKeepAlive", unsafe {
            sys::virConnectSetKeepAlive(self.raw(), interval_s, count)
        }) {
            Ok(rc) => Ok(rc == 0),
            Err(e) if e.is(sys::virErrorNumber_VIR_ERR_NO_SUPPORT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Has `sink` called, on the event thread, when the connection breaks. Drivers that live in our process do not break and refuse this.
    pub(super) fn on_close(&mut self, sink: Sink) -> R<()> {
        let opaque = callbacks::into_opaque(sink);
        // SAFETY: the callback takes what into_opaque made; libvirt frees it by free_opaque exactly once if it took it.
        let rc = unsafe { sys::virConnectRegisterCloseCallback(self.raw(), Some(callbacks::closed), opaque, Some(callbacks::free_opaque)) };
        if rc < 0 {
            let e = error("virConnectRegisterCloseCallback");
            // SAFETY: libvirt refused it and so will neither call nor free it.
            unsafe { callbacks::free_opaque(opaque) };
            return if e.is(sys::virErrorNumber_VIR_ERR_NO_SUPPORT) {
                Ok(())
            } else {
                Err(e)
            };
        }
        self.close_callback = true;
        Ok(())
    }

    /// Has `sink` called, on the event thread, for the events that we use. Events that this driver has not are left out.
    pub(super) fn on_events(&mut self, sink: &Sink) -> R<()> {
        for (id, callback) in callbacks::table() {
            let opaque = callbacks::into_opaque(sink.clone());
            // SAFETY: table() pairs each id with a callback of the signature that libvirt documents for the id; the opaque pointer as above.
            let rc = unsafe {
                sys::virConnectDomainEventRegisterAny(self.raw(), ptr::null_mut(), id, callback, opaque, Some(callbacks::free_opaque))
            };
            if rc >= 0 {
                self.callbacks.push(rc);
                continue;
            }
            let e = error("virConnectDomainEventRegisterAny");
            // SAFETY: libvirt refused it and so will neither call nor free it.
            unsafe { callbacks::free_opaque(opaque) };
            if !e.is(sys::virErrorNumber_VIR_ERR_NO_SUPPORT) && !e.is(sys::virErrorNumber_VIR_ERR_INVALID_ARG) {
                return Err(e);
            }
        }
        Ok(())
    }

    /// Whether the connection is still good, as far as this side knows. No request is sent.
    pub(super) fn is_alive(&self) -> bool {
        // SAFETY: a live connection.
        unsafe { sys::virConnectIsAlive(self.raw()) == 1 }
    }

    /// The number of active domains: a cheap question that the driver itself has to answer.
    pub(super) fn count_domains(&self) -> R<()> {
        // SAFETY: a live connection.
        check("virConnectNumOfDomains", unsafe { sys::virConnectNumOfDomains(self.raw()) }).map(|_| ())
    }

    /// libvirt's version and the hypervisor's, as 1,000,000 * major + 1,000 * minor + release.
    pub(super) fn versions(&self) -> R<(u64, u64)> {
        let (mut library, mut hypervisor) = (0, 0);
        // SAFETY: a live connection and two places to write to.
        unsafe {
            check(
                "virConnectGetLibVersion",
                sys::virConnectGetLibVersion(self.raw(), &raw mut library),
            )?;
            check("virConnectGetVersion", sys::virConnectGetVersion(self.raw(), &raw mut hypervisor))?;
        }
        Ok((library, hypervisor))
    }

    /// What confines domains here: the first of libvirt's security drivers; `none` where it does not say.
    pub(super) fn security_model(&self) -> String {
        let mut model = sys::virSecurityModel {
            model: [0; 257],
            doi: [0; 257],
        };
        // SAFETY: a live connection and a place to write to, in which libvirt ends its text with a zero.
        let text = unsafe {
            if sys::virNodeGetSecurityModel(self.raw(), &raw mut model) < 0 {
                return "none".into();
            }
            std::ffi::CStr::from_ptr(model.model.as_ptr()).to_string_lossy().into_owned()
        };
        if text.is_empty() { "none".into() } else { text }
    }

    /// The host's name.
    pub(super) fn hostname(&self) -> R<String> {
        // SAFETY: a live connection; the string is ours to free.
        take_string("virConnectGetHostname", unsafe { sys::virConnectGetHostname(self.raw()) })
    }

    /// What domains of a type (`kvm`, `qemu`) can have on this host, as XML.
    pub(super) fn domain_capabilities(&self, machine: &str, virt_type: &str) -> R<String> {
        let call = "virConnectGetDomainCapabilities";
        let (machine, virt_type) = (c_string(call, machine)?, c_string(call, virt_type)?);
        // SAFETY: a live connection, C strings that outlive the call, null where libvirt's own choice is wanted; the string is ours to free.
        take_string(call, unsafe {
            sys::virConnectGetDomainCapabilities(self.raw(), ptr::null(), c"x86_64".as_ptr(), machine.as_ptr(), virt_type.as_ptr(), 0)
        })
    }

    /// All active domains.
    pub(super) fn domains(&self) -> R<Vec<Domain>> {
        let mut list: *mut sys::virDomainPtr = ptr::null_mut();
        // SAFETY: a live connection; libvirt allocates the array and hands over one reference per entry.
        unsafe {
            let flags = sys::virConnectListAllDomainsFlags_VIR_CONNECT_LIST_DOMAINS_ACTIVE;
            let count = check(
                "virConnectListAllDomains",
                sys::virConnectListAllDomains(self.raw(), &raw mut list, flags),
            )?;
            let domains = (0..usize::try_from(count).unwrap_or(0))
                .filter_map(|i| NonNull::new(*list.add(i)).map(|ptr| Domain { ptr }))
                .collect();
            libc::free(list.cast());
            Ok(domains)
        }
    }

    /// A domain by name; `None` if there is none.
    pub(super) fn lookup(&self, name: &str) -> R<Option<Domain>> {
        let call = "virDomainLookupByName";
        let name = c_string(call, name)?;
        // SAFETY: a live connection and a C string; the reference is handed over.
        let found = NonNull::new(unsafe { sys::virDomainLookupByName(self.raw(), name.as_ptr()) });
        Self::found(call, found)
    }

    /// A domain by uuid; `None` if there is none.
    pub(super) fn lookup_uuid(&self, uuid: Uuid) -> R<Option<Domain>> {
        // SAFETY: a live connection and 16 bytes; the reference is handed over.
        let found = NonNull::new(unsafe { sys::virDomainLookupByUUID(self.raw(), uuid.as_bytes().as_ptr()) });
        Self::found("virDomainLookupByUUID", found)
    }

    fn found(call: &'static str, found: Option<NonNull<sys::_virDomain>>) -> R<Option<Domain>> {
        match found {
            Some(ptr) => Ok(Some(Domain { ptr })),
            None => {
                let e = error(call);
                if e.is(sys::virErrorNumber_VIR_ERR_NO_DOMAIN) {
                    Ok(None)
                } else {
                    Err(e)
                }
            }
        }
    }

    /// Starts a transient domain.
    pub(super) fn create(&self, xml: &str, paused: bool) -> R<Domain> {
        let call = "virDomainCreateXML";
        let xml = c_string(call, xml)?;
        let flags = if paused {
            sys::virDomainCreateFlags_VIR_DOMAIN_START_PAUSED
        } else {
            0
        };
        // SAFETY: a live connection and a C string; the reference is handed over.
        let ptr = NonNull::new(unsafe { sys::virDomainCreateXML(self.raw(), xml.as_ptr(), flags) }).ok_or_else(|| error(call))?;
        Ok(Domain { ptr })
    }

    /// The XML in a saved image.
    pub(super) fn saved_xml(&self, path: &str) -> R<String> {
        let call = "virDomainSaveImageGetXMLDesc";
        let path = c_string(call, path)?;
        // SAFETY: a live connection and a C string; the string that comes back is ours to free.
        take_string(call, unsafe { sys::virDomainSaveImageGetXMLDesc(self.raw(), path.as_ptr(), 0) })
    }

    /// Starts a domain from a saved image, paused or running as said, or as it was.
    pub(super) fn restore(&self, path: &str, xml: Option<&str>, paused: Option<bool>) -> R<()> {
        let call = "virDomainRestoreFlags";
        let path = c_string(call, path)?;
        let xml = xml.map(|x| c_string(call, x)).transpose()?;
        let flags = match paused {
            Some(true) => sys::virDomainSaveRestoreFlags_VIR_DOMAIN_SAVE_PAUSED,
            Some(false) => sys::virDomainSaveRestoreFlags_VIR_DOMAIN_SAVE_RUNNING,
            None => 0,
        };
        // SAFETY: a live connection and C strings that outlive the call; null keeps the image's own XML.
        let rc = unsafe { sys::virDomainRestoreFlags(self.raw(), path.as_ptr(), xml.as_ref().map_or(ptr::null(), |x| x.as_ptr()), flags) };
        check(call, rc).map(|_| ())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A registered callback holds a reference of its own: without this a broken connection would stay for ever.
        // SAFETY: a live connection, ids that it gave us, and the one reference that is ours.
        unsafe {
            for id in &self.callbacks {
                sys::virConnectDomainEventDeregisterAny(self.raw(), *id);
            }
            if self.close_callback {
                sys::virConnectUnregisterCloseCallback(self.raw(), Some(callbacks::closed));
            }
            sys::virConnectClose(self.raw());
        }
    }
}

/// A domain as a connection sees it. It may be gone at any time; calls then fail with VIR_ERR_NO_DOMAIN.
#[derive(Debug)]
pub(super) struct Domain {
    ptr: NonNull<sys::_virDomain>,
}

// SAFETY: libvirt's domain objects are counted and locked inside: documented for use from several threads.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

macro_rules! simple_calls {
    ($($(#[$doc:meta])* $name:ident = $function:ident ( $($arg:ident : $type:ty),* );)*) => { $(
        $(#[$doc])*
        pub(super) fn $name(&self $(, $arg: $type)*) -> R<()> {
            // SAFETY: a live domain object and plain numbers.
            check(stringify!($function), unsafe { sys::$function(self.raw() $(, $arg)*) }).map(|_| ())
        }
    )* };
}

impl Domain {
    fn raw(&self) -> sys::virDomainPtr {
        self.ptr.as_ptr()
    }

    simple_calls! {
        /// Stops the processors.
        suspend = virDomainSuspend();
        /// Lets the processors run.
        resume = virDomainResume();
        /// Kills QEMU. Flags: 0.
        destroy = virDomainDestroyFlags(flags: c_uint);
        /// Asks for power-off.
        shutdown = virDomainShutdownFlags(flags: c_uint);
        /// Aborts the job that runs on the domain.
        abort_job = virDomainAbortJob();
        /// Milliseconds, flags 0.
        set_max_downtime = virDomainMigrateSetMaxDowntime(downtime_ms: u64, flags: c_uint);
        /// MiB a second, flags 0.
        set_max_speed = virDomainMigrateSetMaxSpeed(mib_s: u64, flags: c_uint);
        /// Begins a measurement.
        start_dirty_rate = virDomainStartDirtyRateCalc(seconds: c_int, flags: c_uint);
    }

    /// Name and uuid. No request is sent.
    pub(super) fn identity(&self) -> Option<(String, Uuid)> {
        // SAFETY: a live domain object.
        unsafe { identity(self.raw()) }
    }

    /// State and reason, as libvirt numbers them.
    pub(super) fn state(&self) -> R<(c_int, c_int)> {
        let (mut state, mut reason) = (0, 0);
        // SAFETY: a live domain object and two places to write to.
        check("virDomainGetState", unsafe {
            sys::virDomainGetState(self.raw(), &raw mut state, &raw mut reason, 0)
        })?;
        Ok((state, reason))
    }

    /// Processor time in ns, memory in KiB, virtual processors.
    pub(super) fn usage(&self) -> R<(u64, u64, u32)> {
        // SAFETY: a structure of plain numbers, for which zeros are good.
        let mut info: sys::virDomainInfo = unsafe { std::mem::zeroed() };
        // SAFETY: a live domain object and a place to write to.
        check("virDomainGetInfo", unsafe { sys::virDomainGetInfo(self.raw(), &raw mut info) })?;
        Ok((info.cpuTime, info.maxMem, info.nrVirtCpu.into()))
    }

    /// The XML. Flags are `virDomainXMLFlags`.
    pub(super) fn xml(&self, flags: c_uint) -> R<String> {
        // SAFETY: a live domain object; the string is ours to free.
        take_string("virDomainGetXMLDesc", unsafe { sys::virDomainGetXMLDesc(self.raw(), flags) })
    }

    /// The metadata element of a namespace; `None` if there is none.
    pub(super) fn metadata(&self, namespace: &str) -> R<Option<String>> {
        let call = "virDomainGetMetadata";
        let namespace = c_string(call, namespace)?;
        let kind = sys::virDomainMetadataType_VIR_DOMAIN_METADATA_ELEMENT;
        // SAFETY: a live domain object and a C string; the string that comes back is ours to free. The cast: an enumeration of three.
        #[expect(clippy::cast_possible_wrap, reason = "an enumeration of three")]
        match take_string(call, unsafe {
            sys::virDomainGetMetadata(self.raw(), kind as c_int, namespace.as_ptr(), 0)
        }) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.is(sys::virErrorNumber_VIR_ERR_NO_DOMAIN_METADATA) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// How many virtual processors the domain has now.
    pub(super) fn vcpus(&self) -> R<u32> {
        // SAFETY: a live domain object.
        let n = unsafe { sys::virDomainGetVcpusFlags(self.raw(), sys::virDomainModificationImpact_VIR_DOMAIN_AFFECT_CURRENT) };
        check("virDomainGetVcpusFlags", n).map(c_int::unsigned_abs)
    }

    /// Pins one virtual processor of the running domain to one CPU of the host.
    pub(super) fn pin_vcpu(&self, vcpu: c_uint, cpu: u32) -> R<()> {
        let (mut map, length) = cpu_map(&[cpu]);
        let flags = sys::virDomainModificationImpact_VIR_DOMAIN_AFFECT_CURRENT;
        // SAFETY: a live domain object, and a map of that length, which is only read.
        let rc = unsafe { sys::virDomainPinVcpuFlags(self.raw(), vcpu, map.as_mut_ptr(), length, flags) };
        check("virDomainPinVcpuFlags", rc).map(|_| ())
    }

    /// Pins all other threads of the running domain.
    pub(super) fn pin_emulator(&self, cpus: &[u32]) -> R<()> {
        let (mut map, length) = cpu_map(cpus);
        let flags = sys::virDomainModificationImpact_VIR_DOMAIN_AFFECT_CURRENT;
        // SAFETY: a live domain object, and a map of that length, which is only read.
        let rc = unsafe { sys::virDomainPinEmulator(self.raw(), map.as_mut_ptr(), length, flags) };
        check("virDomainPinEmulator", rc).map(|_| ())
    }

    /// Replaces the metadata element of a namespace in the running domain.
    pub(super) fn set_metadata(&self, xml: &str, prefix: &str, namespace: &str) -> R<()> {
        let call = "virDomainSetMetadata";
        let (xml, prefix, namespace) = (c_string(call, xml)?, c_string(call, prefix)?, c_string(call, namespace)?);
        let flags = sys::virDomainModificationImpact_VIR_DOMAIN_AFFECT_LIVE;
        // SAFETY: a live domain object and C strings that outlive the call.
        #[expect(clippy::cast_possible_wrap, reason = "an enumeration of three")]
        let rc = unsafe {
            let kind = sys::virDomainMetadataType_VIR_DOMAIN_METADATA_ELEMENT as c_int;
            sys::virDomainSetMetadata(self.raw(), kind, xml.as_ptr(), prefix.as_ptr(), namespace.as_ptr(), flags)
        };
        check(call, rc).map(|_| ())
    }

    /// Migrates peer to peer. Flags are `virDomainMigrateFlags`.
    pub(super) fn migrate(&self, uri: &str, params: &[(&'static [u8], Param<'_>)], flags: c_uint) -> R<()> {
        let call = "virDomainMigrateToURI3";
        let uri = c_string(call, uri)?;
        let params = Params::new(call, params)?;
        let count = c_uint::try_from(params.count).unwrap_or(0);
        // SAFETY: a live domain object, a C string and a list of `count` parameters, all of which outlive the call.
        check(call, unsafe {
            sys::virDomainMigrateToURI3(self.raw(), uri.as_ptr(), params.list, count, flags)
        })
        .map(|_| ())
    }

    /// Saves to a file and ends the domain. Flags are `virDomainSaveRestoreFlags`.
    pub(super) fn save(&self, params: &[(&'static [u8], Param<'_>)], flags: c_uint) -> R<()> {
        let call = "virDomainSaveParams";
        let params = Params::new(call, params)?;
        // SAFETY: a live domain object and a list of parameters that outlives the call.
        check(call, unsafe {
            sys::virDomainSaveParams(self.raw(), params.list, params.count, flags)
        })
        .map(|_| ())
    }

    /// The older save, for drivers that have no other.
    pub(super) fn save_simply(&self, path: &str) -> R<()> {
        let call = "virDomainSave";
        let path = c_string(call, path)?;
        // SAFETY: a live domain object and a C string that outlives the call.
        check(call, unsafe { sys::virDomainSave(self.raw(), path.as_ptr()) }).map(|_| ())
    }

    /// The job that runs on the domain, as libvirt numbers it, and its numbers.
    pub(super) fn job_stats(&self) -> R<(c_int, Values)> {
        let (mut kind, mut list, mut count) = (0, ptr::null_mut(), 0);
        // SAFETY: a live domain object and places to write to; libvirt allocates the list, which is copied and then freed once.
        unsafe {
            check(
                "virDomainGetJobStats",
                sys::virDomainGetJobStats(self.raw(), &raw mut kind, &raw mut list, &raw mut count, 0),
            )?;
            let values = read_values(list, count);
            sys::virTypedParamsFree(list, count);
            Ok((kind, values))
        }
    }

    /// Statistics of some groups (`virDomainStatsTypes`).
    pub(super) fn stats(&self, groups: c_uint) -> R<Values> {
        let mut one = [self.raw(), ptr::null_mut()];
        let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
        // SAFETY: a list of live domain objects that ends with null; libvirt allocates the records, which are copied and then freed once.
        unsafe {
            let count = check(
                "virDomainListGetStats",
                sys::virDomainListGetStats(one.as_mut_ptr(), groups, &raw mut records, 0),
            )?;
            let values = if count > 0 {
                read_values((**records).params, (**records).nparams)
            } else {
                Vec::new()
            };
            sys::virDomainStatsRecordListFree(records);
            Ok(values)
        }
    }

    /// The resident set of its QEMU in KiB; `None` if the driver does not say.
    pub(super) fn resident_kib(&self) -> R<Option<u64>> {
        const LEN: usize = sys::virDomainMemoryStatTags_VIR_DOMAIN_MEMORY_STAT_NR as usize;
        let mut stats = [sys::virDomainMemoryStatStruct { tag: 0, val: 0 }; LEN];
        // SAFETY: a live domain object and room for as many entries as are said; libvirt returns how many it has filled.
        let filled = unsafe { sys::virDomainMemoryStats(self.raw(), stats.as_mut_ptr(), c_uint::try_from(LEN).unwrap_or(0), 0) };
        let filled = usize::try_from(check("virDomainMemoryStats", filled)?).unwrap_or(0).min(LEN);
        #[expect(clippy::cast_sign_loss, reason = "the enumeration has no negative values")]
        let is_rss = |tag: c_int| tag as c_uint == sys::virDomainMemoryStatTags_VIR_DOMAIN_MEMORY_STAT_RSS;
        Ok(stats[..filled].iter().find(|s| is_rss(s.tag)).map(|s| s.val))
    }

    /// The memory parameters (limits); an error where libvirt has no memory cgroup.
    pub(super) fn has_memory_cgroup(&self) -> bool {
        let mut count: c_int = 0;
        let live = sys::virDomainModificationImpact_VIR_DOMAIN_AFFECT_LIVE;
        // SAFETY: a live domain object; with a count of 0 the list may be null, and only the count is written.
        if unsafe { sys::virDomainGetMemoryParameters(self.raw(), ptr::null_mut(), &raw mut count, live) } < 0 || count <= 0 {
            return false;
        }
        let Ok(room) = usize::try_from(count) else { return false };
        // SAFETY: structures of plain numbers and bytes, for which zeros are good.
        let mut list: Vec<sys::virTypedParameter> = vec![unsafe { std::mem::zeroed() }; room];
        // SAFETY: a live domain object and room for `count` entries. All memory parameters are numbers: nothing to free.
        unsafe { sys::virDomainGetMemoryParameters(self.raw(), list.as_mut_ptr(), &raw mut count, live) >= 0 }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: the one reference that is ours.
        unsafe { sys::virDomainFree(self.raw()) };
    }
}

/// The type of libvirt's opaque pointers.
pub(super) type Opaque = *mut c_void;
