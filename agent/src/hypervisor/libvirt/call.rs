//! The frame of a call on libvirt: the lease of a connection, errors in our terms, and the look whether a domain is ours at all.
#![forbid(unsafe_code)]

use super::{
    events,
    ffi::{Connection, Domain, VirError, sys},
    link::{Lease, Link},
    xml,
};
use crate::hypervisor::{DomainInfo, DomainMetadata, HypervisorError, Result};
use std::time::Duration;

/// What goes wrong inside a call: libvirt's error, or one of ours.
pub(super) enum Failure {
    /// libvirt's.
    Vir(VirError),
    /// Ours.
    Ours(HypervisorError),
}

impl From<VirError> for Failure {
    fn from(e: VirError) -> Self {
        Self::Vir(e)
    }
}

impl From<HypervisorError> for Failure {
    fn from(e: HypervisorError) -> Self {
        Self::Ours(e)
    }
}

/// What goes on inside a call.
pub(super) type Answer<T> = std::result::Result<T, Failure>;

/// One call: waits for a place on the link, calls, and explains what went wrong.
pub(super) fn short<T>(link: &Link, name: &str, patience: Duration, call: impl FnOnce(&Connection) -> Answer<T>) -> Result<T> {
    let lease = link.acquire("connect", patience)?;
    call(&lease).map_err(|failure| match failure {
        Failure::Ours(e) => e,
        Failure::Vir(e) => explain(&lease, name, &e),
    })
}

/// Puts libvirt's error into our terms.
pub(super) fn explain(lease: &Lease<'_>, name: &str, e: &VirError) -> HypervisorError {
    let VirError { call, message, .. } = e.clone();
    if lease.broke() {
        return HypervisorError::Connect {
            uri: lease.uri().into(),
            message: format!("{call}: {message}"),
        };
    }
    let any = |numbers: &[sys::virErrorNumber]| numbers.iter().any(|n| e.is(*n));
    if e.is(sys::virErrorNumber_VIR_ERR_NO_DOMAIN) {
        HypervisorError::NoDomain { name: name.into() }
    } else if e.is(sys::virErrorNumber_VIR_ERR_DOM_EXIST) {
        HypervisorError::AlreadyExists { name: name.into() }
    } else if any(&[
        sys::virErrorNumber_VIR_ERR_OPERATION_DENIED,
        sys::virErrorNumber_VIR_ERR_ACCESS_DENIED,
        sys::virErrorNumber_VIR_ERR_AUTH_FAILED,
        sys::virErrorNumber_VIR_ERR_AUTH_CANCELLED,
        sys::virErrorNumber_VIR_ERR_AUTH_UNAVAILABLE,
    ]) {
        HypervisorError::Denied { call, message }
    } else if e.is(sys::virErrorNumber_VIR_ERR_OPERATION_ABORTED) {
        HypervisorError::Aborted { call, message }
    } else if e.is(sys::virErrorNumber_VIR_ERR_OPERATION_INVALID) {
        HypervisorError::WrongState { call, message }
    } else if any(&[
        sys::virErrorNumber_VIR_ERR_NO_SUPPORT,
        sys::virErrorNumber_VIR_ERR_ARGUMENT_UNSUPPORTED,
        sys::virErrorNumber_VIR_ERR_OPERATION_UNSUPPORTED,
        sys::virErrorNumber_VIR_ERR_CONFIG_UNSUPPORTED,
    ]) {
        HypervisorError::Unsupported { call, message }
    } else {
        HypervisorError::Libvirt {
            call,
            domain: e.domain,
            message,
            code: e.code,
        }
    }
}

/// Our metadata of a domain; `None`: not ours.
pub(super) fn metadata_of(domain: &Domain) -> Answer<Option<DomainMetadata>> {
    match domain.metadata(xml::NAMESPACE) {
        // The namespace is libvirt's answer already: it strips the declaration in some releases and keeps it in others.
        Ok(Some(text)) => Ok(Some(xml::read_metadata_element(&text)?)),
        Ok(None) => Ok(None),
        // The second: it has just stopped, and only its name is left for a moment.
        Err(e) if e.is(sys::virErrorNumber_VIR_ERR_NO_DOMAIN) || e.is(sys::virErrorNumber_VIR_ERR_OPERATION_INVALID) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// A domain of ours by name. One that is not ours is as good as none.
pub(super) fn ours(c: &Connection, name: &str) -> Answer<Option<(Domain, DomainMetadata)>> {
    let Some(domain) = c.lookup(name)? else { return Ok(None) };
    Ok(metadata_of(&domain)?.map(|m| (domain, m)))
}

/// The same where there must be one.
pub(super) fn must(c: &Connection, name: &str) -> Answer<Domain> {
    ours(c, name)?
        .map(|(d, _)| d)
        .ok_or_else(|| HypervisorError::NoDomain { name: name.into() }.into())
}

/// `None` if the domain has gone meanwhile.
pub(super) fn describe(domain: &Domain, metadata: DomainMetadata) -> Answer<Option<DomainInfo>> {
    let Some((name, uuid)) = domain.identity() else { return Ok(None) };
    let told = domain.state().and_then(|state| Ok((state, domain.usage()?)));
    match told {
        Ok(((state, reason), (cpu_time_ns, mem_kib, vcpus))) => {
            let (state, reason) = events::state(state, reason);
            Ok(Some(DomainInfo {
                name,
                uuid,
                state,
                reason,
                metadata,
                cpu_time_ns,
                mem_mib: mem_kib / 1024,
                vcpus,
            }))
        }
        Err(e) if e.is(sys::virErrorNumber_VIR_ERR_NO_DOMAIN) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
