//! The functions that libvirt calls, all on its event thread. They copy what they get into a [`Raw`] and hand it to a sink, which must neither block nor
//! call libvirt: the event thread also reads the answers, so a call from here would wait for itself.
//!
//! No panic leaves a callback: unwinding into C is undefined.
use super::ffi::{Opaque, Values, identity, read_values, sys};
use std::{
    ffi::c_int,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};
use uuid::Uuid;

/// An event as libvirt tells it, with its numbers.
#[derive(Debug, Clone)]
pub(super) enum Raw {
    /// `VIR_DOMAIN_EVENT_ID_LIFECYCLE`.
    Lifecycle {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
        /// `virDomainEventType`.
        event: c_int,
        /// One of the enumerations that belong to it.
        detail: c_int,
    },
    /// A migration's next pass.
    Iteration {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
        /// Which.
        iteration: c_int,
    },
    /// A job on a domain is done; its final numbers.
    JobCompleted {
        /// The domain.
        uuid: Uuid,
        /// The numbers.
        values: Values,
    },
    /// The connection is closed.
    Closed,
}

/// Where events go.
pub(super) type Sink = Arc<dyn Fn(Raw) + Send + Sync>;

/// The pointer that libvirt keeps for us: a box with the sink.
pub(super) fn into_opaque(sink: Sink) -> Opaque {
    Box::into_raw(Box::new(sink)).cast()
}

/// Drops what [`into_opaque`] made; libvirt's free callback.
///
/// # Safety
/// `opaque` comes from [`into_opaque`] and is not used afterwards.
pub(super) unsafe extern "C" fn free_opaque(opaque: Opaque) {
    guard(|| {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(opaque.cast::<Sink>()) });
    });
}

/// libvirt's error handler: does nothing, where the default prints to stderr. Errors are fetched by the thread that got them.
pub(super) unsafe extern "C" fn ignore_error(_user_data: Opaque, _error: sys::virErrorPtr) {}

fn guard(body: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(body)).is_err() {
        log::error!("a handler of libvirt's events panicked; the event is lost");
    }
}

/// Hands an event to the sink behind `opaque`.
///
/// # Safety
/// `opaque` comes from [`into_opaque`] and was not freed.
unsafe fn deliver(opaque: Opaque, raw: impl FnOnce() -> Option<Raw>) {
    guard(|| {
        // SAFETY: the caller's promise.
        let sink = unsafe { &*opaque.cast::<Sink>() };
        if let Some(raw) = raw() {
            sink(raw);
        }
    });
}

/// The connection broke.
///
/// # Safety
/// Called by libvirt with what was registered.
pub(super) unsafe extern "C" fn closed(_conn: sys::virConnectPtr, _reason: c_int, opaque: Opaque) {
    // SAFETY: libvirt frees the opaque pointer only after the last call.
    unsafe { deliver(opaque, || Some(Raw::Closed)) };
}

unsafe extern "C" fn lifecycle(_conn: sys::virConnectPtr, domain: sys::virDomainPtr, event: c_int, detail: c_int, opaque: Opaque) -> c_int {
    // SAFETY: libvirt hands a live domain object for the time of the call, and frees the opaque pointer only after the last call.
    unsafe {
        deliver(opaque, || {
            identity(domain).map(|(name, uuid)| Raw::Lifecycle { name, uuid, event, detail })
        });
    };
    0
}

unsafe extern "C" fn iteration(_conn: sys::virConnectPtr, domain: sys::virDomainPtr, iteration: c_int, opaque: Opaque) {
    // SAFETY: as in lifecycle().
    unsafe {
        deliver(opaque, || {
            identity(domain).map(|(name, uuid)| Raw::Iteration { name, uuid, iteration })
        });
    };
}

unsafe extern "C" fn job_completed(
    _conn: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    params: sys::virTypedParameterPtr,
    count: c_int,
    opaque: Opaque,
) {
    // SAFETY: as in lifecycle(); libvirt owns the list, fills `count` entries and frees it after the call.
    unsafe {
        deliver(opaque, || {
            identity(domain).map(|(_, uuid)| Raw::JobCompleted {
                uuid,
                values: read_values(params, count),
            })
        });
    };
}

/// Each event that we use with its callback, in the type that libvirt registers any of them by.
pub(super) fn table() -> [(c_int, sys::virConnectDomainEventGenericCallback); 3] {
    type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, Opaque);
    type Lifecycle = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, Opaque) -> c_int;
    type Iteration = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, Opaque);
    type Completed = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, sys::virTypedParameterPtr, c_int, Opaque);
    // SAFETY: libvirt's VIR_DOMAIN_EVENT_CALLBACK: a callback is registered as a generic one and cast back, by its id, before it is called.
    // Function pointers are all of one size.
    #[expect(clippy::cast_possible_wrap, reason = "small enumerations")]
    unsafe {
        [
            (
                sys::virDomainEventID_VIR_DOMAIN_EVENT_ID_LIFECYCLE as c_int,
                Some(std::mem::transmute::<Lifecycle, Generic>(lifecycle)),
            ),
            (
                sys::virDomainEventID_VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION as c_int,
                Some(std::mem::transmute::<Iteration, Generic>(iteration)),
            ),
            (
                sys::virDomainEventID_VIR_DOMAIN_EVENT_ID_JOB_COMPLETED as c_int,
                Some(std::mem::transmute::<Completed, Generic>(job_completed)),
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_that_panics_does_not_unwind_into_libvirt() {
        let opaque = into_opaque(Arc::new(|_| panic!("on purpose")));
        // SAFETY: the opaque pointer is good until it is freed here, once; closed() does not look at the connection.
        unsafe {
            closed(std::ptr::null_mut(), 0, opaque);
            free_opaque(opaque);
        }
    }
}
