//! libvirt's XML: written from a [`DomainSpec`], and read where libvirt answers in XML.
//!
//! The machine is as small as it can be: no graphics, USB, sound or balloon, one serial port to a file, virtio for the rest. A guest that powers off,
//! reboots or panics ends the domain: a VM lives as long as its job's program, and never longer than its first boot.
#![forbid(unsafe_code)]

use crate::hypervisor::{Boot, CpuModel, Disk, DiskCache, DiskFormat, DomainMetadata, DomainSpec, HypervisorError, Result};
use quick_xml::{
    Reader, Writer, XmlVersion,
    events::{BytesEnd, BytesStart, BytesText, Event},
};
use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};
use uuid::Uuid;

/// The namespace of our metadata.
pub const NAMESPACE: &str = "https://slurm-vm.org/domain/1";
/// The prefix that libvirt writes it with.
pub const PREFIX: &str = "slurmvm";

/// What is not said is libvirt's own choice of machine: `q35`, which every supported release has (RHEL 10 has no `pc`).
pub const DEFAULT_MACHINE: &str = "q35";

/// For which driver the XML is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// QEMU.
    Qemu,
    /// libvirt's test driver, which takes its own domain type only.
    Test,
}

/// Elements as a tree of closures would be: each method writes one element.
struct Xml(Writer<Vec<u8>>);

type Attrs<'a> = &'a [(&'a str, &'a str)];

impl Xml {
    fn put(&mut self, event: Event<'_>) {
        // Writing to memory does not fail.
        let _ = self.0.write_event(event);
    }

    fn start(name: &str, attrs: Attrs<'_>) -> BytesStart<'static> {
        let mut start = BytesStart::new(name.to_owned());
        for (key, value) in attrs {
            start.push_attribute((*key, *value));
        }
        start
    }

    fn empty(&mut self, name: &str, attrs: Attrs<'_>) {
        self.put(Event::Empty(Self::start(name, attrs)));
    }

    fn text(&mut self, name: &str, attrs: Attrs<'_>, text: &str) {
        self.put(Event::Start(Self::start(name, attrs)));
        self.put(Event::Text(BytesText::new(text)));
        self.put(Event::End(BytesEnd::new(name)));
    }

    fn nest(&mut self, name: &str, attrs: Attrs<'_>, body: impl FnOnce(&mut Self)) {
        self.put(Event::Start(Self::start(name, attrs)));
        body(self);
        self.put(Event::End(BytesEnd::new(name)));
    }

    fn finish(self) -> String {
        String::from_utf8_lossy(&self.0.into_inner()).into_owned()
    }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn format_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

/// The XML of a new domain.
#[must_use]
pub fn domain(spec: &DomainSpec, flavor: Flavor) -> String {
    let mut xml = Xml(Writer::new_with_indent(Vec::new(), b' ', 2));
    let virt_type = match (flavor, spec.domain_type) {
        (Flavor::Test, _) => "test",
        (_, crate::hypervisor::DomainType::Kvm) => "kvm",
        (_, crate::hypervisor::DomainType::Qemu) => "qemu",
    };
    xml.nest("domain", &[("type", virt_type)], |x| {
        x.text("name", &[], &spec.name);
        x.text("uuid", &[], &spec.uuid.to_string());
        x.nest("metadata", &[], |x| metadata_element(x, &spec.metadata));
        x.text("memory", &[("unit", "MiB")], &spec.mem_mib.to_string());
        if spec.has_companions() {
            x.nest("memoryBacking", &[], |x| {
                x.empty("source", &[("type", "memfd")]);
                x.empty("access", &[("mode", "shared")]);
            });
        }
        x.text("vcpu", &[("placement", "static")], &spec.vcpus.to_string());
        if let Some(limit) = spec.hard_limit_mib {
            x.nest("memtune", &[], |x| x.text("hard_limit", &[("unit", "MiB")], &limit.to_string()));
        }
        pinning(x, spec);
        os(x, spec, flavor);
        x.nest("features", &[], |x| {
            x.empty("acpi", &[]);
            x.empty("apic", &[]);
        });
        cpu(x, spec);
        x.nest("clock", &[("offset", "utc")], |x| {
            x.empty("timer", &[("name", "rtc"), ("tickpolicy", "catchup")]);
            x.empty("timer", &[("name", "pit"), ("tickpolicy", "delay")]);
            x.empty("timer", &[("name", "hpet"), ("present", "no")]);
        });
        for event in ["on_poweroff", "on_reboot", "on_crash"] {
            x.text(event, &[], "destroy");
        }
        x.nest("devices", &[], |x| devices(x, spec));
    });
    xml.finish()
}

fn pinning(x: &mut Xml, spec: &DomainSpec) {
    if spec.cpuset.is_empty() {
        return;
    }
    let all = spec.cpuset.iter().fold(String::new(), |mut all, core| {
        let _ = write!(all, "{}{core}", if all.is_empty() { "" } else { "," });
        all
    });
    x.nest("cputune", &[], |x| {
        for (vcpu, core) in (0..spec.vcpus).zip(spec.cpuset.iter().cycle()) {
            x.empty("vcpupin", &[("vcpu", &vcpu.to_string()), ("cpuset", &core.to_string())]);
        }
        x.empty("emulatorpin", &[("cpuset", &all)]);
    });
}

fn os(x: &mut Xml, spec: &DomainSpec, flavor: Flavor) {
    x.nest("os", &[], |x| {
        let machine = spec.machine.as_deref().unwrap_or(DEFAULT_MACHINE);
        match flavor {
            Flavor::Qemu => x.text("type", &[("arch", "x86_64"), ("machine", machine)], "hvm"),
            Flavor::Test => x.text("type", &[], "hvm"),
        }
        match &spec.boot {
            Boot::Kernel { kernel, initrd, cmdline } => {
                x.text("kernel", &[], &path(kernel));
                if let Some(initrd) = initrd {
                    x.text("initrd", &[], &path(initrd));
                }
                x.text("cmdline", &[], cmdline);
            }
            Boot::Disk => x.empty("boot", &[("dev", "hd")]),
        }
    });
}

fn cpu(x: &mut Xml, spec: &DomainSpec) {
    // Under emulation libvirt's comparison with the host means nothing, and would refuse features that QEMU emulates.
    let check = if spec.domain_type == crate::hypervisor::DomainType::Kvm {
        "partial"
    } else {
        "none"
    };
    match &spec.cpu {
        CpuModel::Default => {}
        CpuModel::Maximum => x.empty("cpu", &[("mode", "maximum")]),
        CpuModel::HostModel => x.empty("cpu", &[("mode", "host-model"), ("check", check)]),
        CpuModel::Named(name) => x.nest("cpu", &[("mode", "custom"), ("match", "exact"), ("check", check)], |x| {
            x.text("model", &[("fallback", "forbid")], name);
        }),
    }
}

fn devices(x: &mut Xml, spec: &DomainSpec) {
    for d in &spec.disks {
        disk(x, d);
    }
    x.empty("controller", &[("type", "usb"), ("model", "none")]);
    x.nest("serial", &[("type", "file")], |x| {
        x.empty("source", &[("path", &path(&spec.serial_log)), ("append", "on")]);
        x.empty("target", &[("port", "0")]);
    });
    for channel in &spec.channels {
        x.nest("channel", &[("type", "unix")], |x| {
            x.empty("source", &[("mode", "bind"), ("path", &path(&channel.socket))]);
            x.empty("target", &[("type", "virtio"), ("name", &channel.name)]);
        });
    }
    for directory in &spec.directories {
        x.nest("filesystem", &[("type", "mount")], |x| {
            x.empty("driver", &[("type", "virtiofs"), ("queue", "1024")]);
            x.empty("source", &[("socket", &path(&directory.socket))]);
            x.empty("target", &[("dir", &directory.tag)]);
        });
    }
    for interface in &spec.interfaces {
        x.nest("interface", &[("type", "vhostuser")], |x| {
            x.empty("mac", &[("address", &interface.mac)]);
            let socket = path(&interface.socket);
            x.nest("source", &[("type", "unix"), ("path", &socket), ("mode", "client")], |x| {
                // The other end may be started anew.
                x.empty("reconnect", &[("enabled", "yes"), ("timeout", "1")]);
            });
            x.empty("model", &[("type", "virtio")]);
        });
    }
    x.empty("memballoon", &[("model", "none")]);
    x.nest("rng", &[("model", "virtio")], |x| {
        x.text("backend", &[("model", "random")], "/dev/urandom");
    });
    x.empty("panic", &[("model", "isa")]);
}

fn disk(x: &mut Xml, disk: &Disk) {
    let cache = match disk.cache {
        DiskCache::None => "none",
        DiskCache::Writeback => "writeback",
    };
    x.nest("disk", &[("type", "file"), ("device", "disk")], |x| {
        x.empty(
            "driver",
            &[
                ("name", "qemu"),
                ("type", format_name(disk.format)),
                ("cache", cache),
                ("discard", "unmap"),
            ],
        );
        if disk.readonly {
            shared_source(x, &disk.path);
        } else {
            x.empty("source", &[("file", &path(&disk.path))]);
        }
        backing(x, &disk.backing);
        x.empty("target", &[("dev", &disk.target), ("bus", "virtio")]);
        if let Some(serial) = &disk.serial {
            x.text("serial", &[], serial);
        }
        if disk.readonly {
            x.empty("readonly", &[]);
        }
    });
}

/// A file that others use as well: libvirt would give it to the QEMU user (and not always back), who could then write into it.
fn shared_source(x: &mut Xml, file: &Path) {
    x.nest("source", &[("file", &path(file))], |x| {
        x.empty("seclabel", &[("model", "dac"), ("relabel", "no")]);
    });
}

/// The chain of backing files, nearest first, which QEMU must be able to read as they are. The empty element at the end says "nothing below": without it libvirt probes the image.
fn backing(x: &mut Xml, chain: &[(PathBuf, DiskFormat)]) {
    match chain.split_first() {
        None => x.empty("backingStore", &[]),
        Some(((below, format), rest)) => x.nest("backingStore", &[("type", "file")], |x| {
            x.empty("format", &[("type", format_name(*format))]);
            shared_source(x, below);
            backing(x, rest);
        }),
    }
}

fn metadata_element(x: &mut Xml, m: &DomainMetadata) {
    x.empty(
        &format!("{PREFIX}:domain"),
        &[
            (&format!("xmlns:{PREFIX}"), NAMESPACE),
            ("job", &m.job.to_string()),
            ("k", &m.k.to_string()),
            ("user", &m.user),
            ("uid", &m.uid.to_string()),
            ("node", &m.node),
            ("run", &m.run.to_string()),
            ("generation", &m.generation.to_string()),
            ("spec", &m.spec),
        ],
    );
}

/// Our metadata as the element that libvirt stores.
#[must_use]
pub fn metadata(m: &DomainMetadata) -> String {
    let mut xml = Xml(Writer::new(Vec::new()));
    metadata_element(&mut xml, m);
    xml.finish()
}

/// Our metadata as libvirt wants it when it is replaced: it adds prefix and namespace itself, and refuses an element that has them.
#[must_use]
pub fn metadata_to_set(m: &DomainMetadata) -> String {
    metadata(m).replacen(&format!("<{PREFIX}:domain xmlns:{PREFIX}=\"{NAMESPACE}\""), "<domain", 1)
}

/// Reads the element that libvirt gave for our namespace: whether the declaration is still on it differs.
pub fn read_metadata_element(xml: &str) -> Result<DomainMetadata> {
    find_metadata(xml, |e| Ok(e.local_name().as_ref() == "domain"))?.ok_or_else(|| HypervisorError::Invalid {
        what: format!("metadata of an unknown form: {xml}"),
    })
}

fn bad(what: &str, error: &dyn std::fmt::Display) -> HypervisorError {
    HypervisorError::Invalid {
        what: format!("{what}: {error}"),
    }
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Result<Option<String>> {
    for attribute in element.attributes() {
        let attribute = attribute.map_err(|e| bad("XML of libvirt", &e))?;
        if attribute.key.as_ref() == name {
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|e| bad("XML of libvirt", &e))?;
            return Ok(Some(value.into_owned()));
        }
    }
    Ok(None)
}

/// Reads our metadata: the element alone, or the first one inside a domain's XML. `None`: there is none in our namespace.
///
/// Attributes that are missing are zero or empty, unknown ones are passed over: other versions of us may have written it.
pub fn read_metadata(xml: &str) -> Result<Option<DomainMetadata>> {
    find_metadata(xml, is_ours)
}

fn find_metadata(xml: &str, wanted: impl Fn(&BytesStart<'_>) -> Result<bool>) -> Result<Option<DomainMetadata>> {
    let mut reader = Reader::from_str(xml);
    loop {
        match reader.read_event().map_err(|e| bad("XML of libvirt", &e))? {
            Event::Eof => return Ok(None),
            Event::Start(e) | Event::Empty(e) if wanted(&e)? => {
                let text = |name| attribute(&e, name).map(Option::unwrap_or_default);
                let number = |name: &str| -> Result<u64> {
                    attribute(&e, name)?.map_or(Ok(0), |v| v.parse().map_err(|e| bad(&format!("metadata {name}={v:?}"), &e)))
                };
                let small = |name: &str| -> Result<u32> { u32::try_from(number(name)?).map_err(|e| bad(&format!("metadata {name}"), &e)) };
                return Ok(Some(DomainMetadata {
                    job: small("job")?,
                    k: small("k")?,
                    user: text("user")?,
                    uid: small("uid")?,
                    spec: text("spec")?,
                    node: text("node")?,
                    run: number("run")?,
                    generation: number("generation")?,
                }));
            }
            _ => {}
        }
    }
}

/// Whether an element is ours: named `domain` and carrying the declaration of our namespace, under any prefix. libvirt always writes the
/// declaration onto the element itself.
fn is_ours(element: &BytesStart<'_>) -> Result<bool> {
    if element.local_name().as_ref() != "domain" {
        return Ok(false);
    }
    for attribute in element.attributes() {
        let attribute = attribute.map_err(|e| bad("XML of libvirt", &e))?;
        if attribute.key.as_ref().starts_with("xmlns") && attribute.value.as_ref() == NAMESPACE {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Name and uuid of a domain's XML.
pub fn read_identity(xml: &str) -> Result<(String, Uuid)> {
    let (mut name, mut uuid) = (None, None);
    walk(xml, |at, text| match at {
        ["domain", "name"] => name = name.take().or_else(|| Some(text.to_owned())),
        ["domain", "uuid"] => uuid = uuid.take().or_else(|| Uuid::parse_str(text).ok()),
        _ => {}
    })?;
    name.zip(uuid).ok_or_else(|| HypervisorError::Invalid {
        what: "XML of libvirt without name or uuid".into(),
    })
}

/// Calls back with each text and the names of the elements around it.
fn walk(xml: &str, mut found: impl FnMut(&[&str], &str)) -> Result<()> {
    let mut reader = Reader::from_str(xml);
    let mut stack: Vec<String> = Vec::new();
    loop {
        match reader.read_event().map_err(|e| bad("XML of libvirt", &e))? {
            Event::Eof => return Ok(()),
            Event::Start(e) => stack.push(e.name().as_ref().to_owned()),
            Event::End(_) => {
                stack.pop();
            }
            Event::Text(t) => {
                found(&stack.iter().map(String::as_str).collect::<Vec<_>>(), t.trim());
            }
            _ => {}
        }
    }
}

/// The processor models without caveats, and the `<cpu>` of `host-model`, from libvirt's domain capabilities.
pub fn read_cpus(capabilities: &str) -> Result<(Vec<String>, String)> {
    let mut reader = Reader::from_str(capabilities);
    let (mut models, mut host_model) = (Vec::new(), Writer::new(Vec::new()));
    let (mut mode, mut usable, mut depth) = (String::new(), false, 0u32);
    loop {
        let event = reader.read_event().map_err(|e| bad("domain capabilities", &e))?;
        if mode == "host-model" && matches!(&event, Event::End(e) if e.name().as_ref() == "mode") {
            mode.clear();
        }
        if mode == "host-model" && depth > 0 {
            let _ = host_model.write_event(event.borrow());
        }
        match &event {
            Event::Eof => break,
            Event::Start(e) if e.name().as_ref() == "mode" => {
                mode = if attribute(e, "supported")?.as_deref() == Some("yes") {
                    attribute(e, "name")?.unwrap_or_default()
                } else {
                    String::new()
                };
                depth = 1;
            }
            Event::Start(e) if mode == "custom" && e.name().as_ref() == "model" => {
                usable = attribute(e, "usable")?.as_deref() == Some("yes");
            }
            Event::Text(t) if mode == "custom" && usable => {
                models.push(t.trim().to_owned());
                usable = false;
            }
            Event::End(e) if e.name().as_ref() == "mode" => {
                mode.clear();
                depth = 0;
            }
            _ => {}
        }
    }
    let inside = String::from_utf8_lossy(&host_model.into_inner()).trim().to_owned();
    models.sort();
    Ok((
        models,
        if inside.is_empty() {
            inside
        } else {
            format!("<cpu mode='custom' match='exact'>{inside}</cpu>")
        },
    ))
}

/// Changes a domain's XML for another place: the source file of disks by target, with the layer's backing file, and our metadata; its pinning goes, for other
/// CPUs are the job's there ([`crate::hypervisor::Hypervisor::pin`]). All else stays, with the addresses that libvirt gave the devices, which is what a restore
/// and a migration compare.
///
/// Of `disks` the target says which one; path, format and backing files are what it gets; the rest is not looked at.
pub fn repoint(xml: &str, disks: &[Disk], metadata: Option<&DomainMetadata>) -> Result<String> {
    let mut reader = Reader::from_str(xml);
    let mut out = Writer::new(Vec::new());
    let mut block: Option<Vec<Event<'static>>> = None;
    let mut replaced = 0usize;
    loop {
        let event = reader.read_event().map_err(|e| bad("XML of libvirt", &e))?;
        if matches!(event, Event::Eof) {
            break;
        }
        if let (Some(m), Event::Start(e) | Event::Empty(e)) = (metadata, &event)
            && is_ours(e)?
        {
            let mut x = Xml(out);
            metadata_element(&mut x, m);
            out = x.0;
            if matches!(event, Event::Start(_)) {
                skip_to_end(&mut reader)?;
            }
            continue;
        }
        if let Event::Start(e) = &event
            && e.name().as_ref() == "cputune"
        {
            skip_to_end(&mut reader)?;
            continue;
        }
        match (&mut block, &event) {
            (None, Event::Start(e)) if e.name().as_ref() == "disk" => block = Some(vec![event.into_owned()]),
            (Some(events), Event::End(e)) if e.name().as_ref() == "disk" => {
                events.push(event.into_owned());
                replaced += usize::from(write_disk(&mut out, events, disks)?);
                block = None;
            }
            (Some(events), _) => events.push(event.into_owned()),
            (None, _) => {
                let _ = out.write_event(event);
            }
        }
    }
    if replaced != disks.len() {
        return Err(HypervisorError::Invalid {
            what: format!("{} of {} disks are not in the XML", disks.len() - replaced, disks.len()),
        });
    }
    Ok(String::from_utf8_lossy(&out.into_inner()).into_owned())
}

fn skip_to_end(reader: &mut Reader<&[u8]>) -> Result<()> {
    let mut depth = 1;
    while depth > 0 {
        match reader.read_event().map_err(|e| bad("XML of libvirt", &e))? {
            Event::Start(_) => depth += 1,
            Event::End(_) => depth -= 1,
            Event::Eof => break,
            _ => {}
        }
    }
    Ok(())
}

/// Writes one collected `<disk>`, with the wanted source if its target is one of `disks`.
fn write_disk(out: &mut Writer<Vec<u8>>, events: &[Event<'static>], disks: &[Disk]) -> Result<bool> {
    let mut wanted = None;
    for event in events {
        if let Event::Empty(e) | Event::Start(e) = event
            && e.name().as_ref() == "target"
        {
            let target = attribute(e, "dev")?;
            wanted = disks.iter().find(|d| Some(&d.target) == target.as_ref());
        }
    }
    let Some(wanted) = wanted else {
        for event in events {
            let _ = out.write_event(event.borrow());
        }
        return Ok(false);
    };
    let mut x = Xml(std::mem::replace(out, Writer::new(Vec::new())));
    let mut skipping = 0u32;
    for event in events {
        let replaced_element = |e: &BytesStart<'_>| matches!(e.name().as_ref(), "source" | "backingStore");
        match event {
            Event::Start(_) if skipping > 0 => skipping += 1,
            Event::End(_) if skipping > 0 => skipping -= 1,
            _ if skipping > 0 => {}
            Event::Start(e) if replaced_element(e) => skipping = 1,
            Event::Empty(e) if replaced_element(e) => {}
            Event::Empty(e) if e.name().as_ref() == "driver" => {
                let mut driver = BytesStart::new("driver");
                for attribute in e.attributes() {
                    let attribute = attribute.map_err(|e| bad("XML of libvirt", &e))?;
                    if attribute.key.as_ref() == "type" {
                        driver.push_attribute(("type", format_name(wanted.format)));
                    } else {
                        driver.push_attribute(attribute);
                    }
                }
                x.put(Event::Empty(driver));
                x.empty("source", &[("file", &path(&wanted.path))]);
                backing(&mut x, &wanted.backing);
            }
            other => x.put(other.borrow()),
        }
    }
    *out = x.0;
    Ok(true)
}
