//! What a user asks for with `--vm` and its companions, and how it travels.
use crate::{
    mount::{self, MountError, MountWish},
    size::{self, SizeError},
    time::{self, TimeError},
};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use thiserror::Error;

/// The version of the JSON form of [`VmSpec`].
pub const SPEC_VERSION: u32 = 1;
/// The longest image name.
pub const MAX_IMAGE_NAME: usize = 64;
/// The most vCPUs that can be asked for.
pub const MAX_VCPUS: u32 = 4096;

/// What to do with a VM when its job has to leave the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PreemptWay {
    /// Move it while it runs.
    Live,
    /// Save its memory and resume it later, elsewhere.
    Save,
    /// Stop it and run the job again from the start.
    Requeue,
    /// End the job.
    Cancel,
}

impl PreemptWay {
    /// All ways, in the order of preference.
    pub const ALL: [PreemptWay; 4] = [PreemptWay::Live, PreemptWay::Save, PreemptWay::Requeue, PreemptWay::Cancel];
    /// What is tried, in this order, when nobody says otherwise.
    pub const DEFAULT: [PreemptWay; 3] = [PreemptWay::Live, PreemptWay::Save, PreemptWay::Requeue];

    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            PreemptWay::Live => "live",
            PreemptWay::Save => "save",
            PreemptWay::Requeue => "requeue",
            PreemptWay::Cancel => "cancel",
        }
    }

    /// Reads a comma-separated list: no repeats, and `cancel` only as the last resort.
    ///
    /// # Errors
    /// Says which word is wrong and which are known.
    pub fn parse_list(text: &str) -> Result<Vec<PreemptWay>, SpecError> {
        let mut ways: Vec<PreemptWay> = Vec::new();
        for word in text.split(',') {
            let way: PreemptWay = word.trim().parse()?;
            if ways.contains(&way) {
                return Err(SpecError::WayTwice(way));
            }
            if ways.last() == Some(&PreemptWay::Cancel) {
                return Err(SpecError::CancelNotLast(text.to_owned()));
            }
            ways.push(way);
        }
        Ok(ways)
    }

    /// Writes a list as [`PreemptWay::parse_list`] reads it.
    #[must_use]
    pub fn format_list(ways: &[PreemptWay]) -> String {
        ways.iter().map(|w| w.word()).collect::<Vec<_>>().join(",")
    }
}

impl fmt::Display for PreemptWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for PreemptWay {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        PreemptWay::ALL
            .into_iter()
            .find(|w| w.word() == text)
            .ok_or_else(|| SpecError::UnknownWay(text.to_owned()))
    }
}

/// What a guest can reach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Nothing.
    #[default]
    None,
    /// What a process of the job's user on the node reaches.
    User,
}

impl Network {
    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::User => "user",
        }
    }

    /// There is none.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

impl FromStr for Network {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let all = [Self::None, Self::User];
        all.into_iter()
            .find(|n| n.word() == text)
            .ok_or_else(|| SpecError::Network(text.to_owned()))
    }
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecError {
    /// The image name is not one.
    #[error(
        "'{0}' is not an image name: use 1 to {MAX_IMAGE_NAME} letters, digits, dots, underscores or hyphens, not starting with a dot or hyphen"
    )]
    Image(String),
    /// The number of vCPUs is not one.
    #[error("'{0}' is not a number of vCPUs: give a whole number from 1 to {MAX_VCPUS}")]
    Cpus(String),
    /// The memory size.
    #[error(transparent)]
    Mem(#[from] SizeError),
    /// The boot timeout.
    #[error(transparent)]
    BootTimeout(#[from] TimeError),
    /// A directory to be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// An unknown network.
    #[error("'{0}' is not a network that a guest can have: none or user")]
    Network(String),
    /// An unknown way.
    #[error("'{0}' is not a way to leave a node: the ways are live, save, requeue and cancel, separated by commas")]
    UnknownWay(String),
    /// A way twice.
    #[error("'{0}' is listed twice")]
    WayTwice(PreemptWay),
    /// Something after cancel.
    #[error("'{0}' goes on after cancel, which ends the job: cancel can only be last")]
    CancelNotLast(String),
    /// A companion option without an image.
    #[error("needs --vm=IMAGE as well")]
    NoImage,
    /// A version that this build does not know.
    #[error("version {0} of the request is not known here, only {SPEC_VERSION}")]
    Version(u32),
    /// The JSON form cannot be read.
    #[error("the request cannot be read: {0}")]
    Json(String),
}

/// The options, named without their prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmOption {
    /// `--vm=IMAGE`
    Image,
    /// `--vm-cpus=N`
    Cpus,
    /// `--vm-mem=SIZE`
    Mem,
    /// `--vm-boot-timeout=TIME`
    BootTimeout,
    /// `--vm-preempt=LIST`
    Preempt,
    /// `--vm-mount=LIST`
    Mount,
    /// `--vm-workdir=PATH`
    Workdir,
    /// `--vm-net=none|user`
    Net,
    /// `--vm-disk=SIZE`
    Disk,
}

/// How many options there are.
pub const OPTIONS: usize = VmOption::ALL.len();

impl VmOption {
    /// All of them.
    pub const ALL: [VmOption; 9] = [
        VmOption::Image,
        VmOption::Cpus,
        VmOption::Mem,
        VmOption::BootTimeout,
        VmOption::Preempt,
        VmOption::Mount,
        VmOption::Workdir,
        VmOption::Net,
        VmOption::Disk,
    ];

    /// What follows the prefix in the option's name.
    #[must_use]
    pub fn suffix(self) -> &'static str {
        match self {
            VmOption::Image => "",
            VmOption::Cpus => "-cpus",
            VmOption::Mem => "-mem",
            VmOption::BootTimeout => "-boot-timeout",
            VmOption::Preempt => "-preempt",
            VmOption::Mount => "-mount",
            VmOption::Workdir => "-workdir",
            VmOption::Net => "-net",
            VmOption::Disk => "-disk",
        }
    }

    /// Its place in [`VmOption::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        VmOption::ALL.iter().position(|o| *o == self).unwrap_or(0)
    }
}

/// An option that was refused, and why.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("--vm{}: {source}", option.suffix())]
pub struct OptionError {
    /// The option.
    pub option: VmOption,
    /// The reason.
    pub source: SpecError,
}

/// What a user asks for. Absent values are the image's or the agent's to choose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WireSpec", into = "WireSpec")]
pub struct VmSpec {
    /// The image, by its name in the catalogue.
    pub image: String,
    /// Number of vCPUs; the job's allocated CPUs when absent.
    pub cpus: Option<u32>,
    /// Guest RAM in MiB; what the allocation leaves when absent.
    pub mem_mib: Option<u64>,
    /// How long the guest may take to come up, in seconds.
    pub boot_timeout_s: Option<u32>,
    /// What to do when the job has to leave the node, in this order.
    pub preempt: Option<Vec<PreemptWay>>,
    /// Host directories for the guest, beside what the site gives.
    pub mounts: Vec<MountWish>,
    /// Directory in the guest in which the programs run; the job's working directory when absent.
    pub workdir: Option<String>,
    /// The guest's network; the site's choice when absent.
    pub net: Option<Network>,
    /// Size of the guest's disk in MiB; the image's own when absent.
    pub disk_mib: Option<u64>,
}

/// The JSON form: versioned, and closed to keys that this build does not know.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireSpec {
    v: u32,
    image: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mem_mib: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    boot_timeout_s: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    preempt: Option<Vec<PreemptWay>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<MountWish>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workdir: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    net: Option<Network>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    disk_mib: Option<u64>,
}

impl From<VmSpec> for WireSpec {
    fn from(s: VmSpec) -> Self {
        let VmSpec {
            image,
            cpus,
            mem_mib,
            boot_timeout_s,
            preempt,
            mounts,
            workdir,
            net,
            disk_mib,
        } = s;
        WireSpec {
            v: SPEC_VERSION,
            image,
            cpus,
            mem_mib,
            boot_timeout_s,
            preempt,
            mounts,
            workdir,
            net,
            disk_mib,
        }
    }
}

impl TryFrom<WireSpec> for VmSpec {
    type Error = SpecError;

    fn try_from(w: WireSpec) -> Result<Self, SpecError> {
        if w.v != SPEC_VERSION {
            return Err(SpecError::Version(w.v));
        }
        check_image_name(&w.image)?;
        if let Some(cpus) = w.cpus.filter(|c| !(1..=MAX_VCPUS).contains(c)) {
            return Err(SpecError::Cpus(cpus.to_string()));
        }
        // The same rules as for options, so that no second grammar exists for what comes over a wire.
        let mib = |m: Option<u64>| m.map(|m| size::parse_mib(&m.to_string())).transpose();
        let (mem_mib, disk_mib) = (mib(w.mem_mib)?, mib(w.disk_mib)?);
        let boot_timeout_s = w.boot_timeout_s.map(|t| time::parse_seconds(&t.to_string())).transpose()?;
        let preempt = w
            .preempt
            .map(|p| PreemptWay::parse_list(&PreemptWay::format_list(&p)))
            .transpose()?;
        mount::check_list(&w.mounts)?;
        let workdir = w.workdir.map(|dir| mount::plain_path(&dir)).transpose()?;
        Ok(VmSpec {
            image: w.image,
            cpus: w.cpus,
            mem_mib,
            boot_timeout_s,
            preempt,
            mounts: w.mounts,
            workdir,
            net: w.net,
            disk_mib,
        })
    }
}

/// Checks the grammar of image names: `[A-Za-z0-9._-]{1,64}`, not starting with `.` or `-`. So a name is never a path.
///
/// # Errors
/// Repeats the name and the grammar.
pub fn check_image_name(name: &str) -> Result<(), SpecError> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > MAX_IMAGE_NAME || name.starts_with(['.', '-']) || !name.bytes().all(good) {
        return Err(SpecError::Image(name.chars().take(MAX_IMAGE_NAME + 1).collect()));
    }
    Ok(())
}

/// The options as texts, in the order of [`VmOption::ALL`]; `None` is an option that was not given.
pub type OptionTexts<'a> = [Option<&'a str>; OPTIONS];

impl VmSpec {
    /// A request for an image and nothing else.
    ///
    /// # Errors
    /// When the name is not an image name.
    pub fn for_image(image: &str) -> Result<VmSpec, SpecError> {
        check_image_name(image)?;
        Ok(VmSpec {
            image: image.to_owned(),
            cpus: None,
            mem_mib: None,
            boot_timeout_s: None,
            preempt: None,
            mounts: vec![],
            workdir: None,
            net: None,
            disk_mib: None,
        })
    }

    /// Reads the options. `Ok(None)`: none was given, this is not a VM job.
    ///
    /// # Errors
    /// Names the option, says what is wrong with it and what is allowed.
    pub fn from_options(texts: &OptionTexts<'_>) -> Result<Option<VmSpec>, OptionError> {
        let given = |o: VmOption| texts[o.index()];
        let at = |option: VmOption| move |source: SpecError| OptionError { option, source };
        let Some(image) = given(VmOption::Image) else {
            return match VmOption::ALL.into_iter().find(|o| given(*o).is_some()) {
                Some(option) => Err(at(option)(SpecError::NoImage)),
                None => Ok(None),
            };
        };
        let mut spec = VmSpec::for_image(image).map_err(at(VmOption::Image))?;
        spec.cpus = given(VmOption::Cpus).map(parse_cpus).transpose().map_err(at(VmOption::Cpus))?;
        spec.mem_mib = given(VmOption::Mem)
            .map(size::parse_mib)
            .transpose()
            .map_err(|e| at(VmOption::Mem)(e.into()))?;
        spec.boot_timeout_s = given(VmOption::BootTimeout)
            .map(time::parse_seconds)
            .transpose()
            .map_err(|e| at(VmOption::BootTimeout)(e.into()))?;
        spec.preempt = given(VmOption::Preempt)
            .map(PreemptWay::parse_list)
            .transpose()
            .map_err(at(VmOption::Preempt))?;
        if let Some(list) = given(VmOption::Mount) {
            spec.mounts = mount::parse_list(list).map_err(|e| at(VmOption::Mount)(e.into()))?;
        }
        spec.workdir = given(VmOption::Workdir)
            .map(mount::plain_path)
            .transpose()
            .map_err(|e| at(VmOption::Workdir)(e.into()))?;
        spec.net = given(VmOption::Net).map(str::parse).transpose().map_err(at(VmOption::Net))?;
        spec.disk_mib = given(VmOption::Disk)
            .map(size::parse_mib)
            .transpose()
            .map_err(|e| at(VmOption::Disk)(e.into()))?;
        Ok(Some(spec))
    }

    /// The options that say the same: name without the leading `--`, and value.
    #[must_use]
    pub fn to_options(&self) -> Vec<(String, String)> {
        let name = |o: VmOption| format!("vm{}", o.suffix());
        let mut options = vec![(name(VmOption::Image), self.image.clone())];
        options.extend(self.cpus.map(|c| (name(VmOption::Cpus), c.to_string())));
        options.extend(self.mem_mib.map(|m| (name(VmOption::Mem), size::format_mib(m))));
        options.extend(self.boot_timeout_s.map(|t| (name(VmOption::BootTimeout), t.to_string())));
        options.extend(self.preempt.as_ref().map(|p| (name(VmOption::Preempt), PreemptWay::format_list(p))));
        options.extend((!self.mounts.is_empty()).then(|| (name(VmOption::Mount), mount::format_list(&self.mounts))));
        options.extend(self.workdir.as_ref().map(|dir| (name(VmOption::Workdir), dir.clone())));
        options.extend(self.net.map(|net| (name(VmOption::Net), net.word().to_owned())));
        options.extend(self.disk_mib.map(|m| (name(VmOption::Disk), size::format_mib(m))));
        options
    }

    /// Reads the JSON form.
    ///
    /// # Errors
    /// When it is not JSON, has unknown keys or values, or another version.
    pub fn from_json(text: &str) -> Result<VmSpec, SpecError> {
        serde_json::from_str(text).map_err(|e| SpecError::Json(e.to_string()))
    }

    /// The JSON form, on one line.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Strings, numbers and a list of words: nothing in it can fail.
        serde_json::to_string(self).unwrap_or_default()
    }
}

fn parse_cpus(text: &str) -> Result<u32, SpecError> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let cpus = digits.then(|| text.parse::<u32>().ok()).flatten();
    cpus.filter(|c| (1..=MAX_VCPUS).contains(c))
        .ok_or_else(|| SpecError::Cpus(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use PreemptWay::{Cancel, Live, Requeue, Save};

    const FULL: OptionTexts<'static> = [
        Some("debian-12"),
        Some("2"),
        Some("2G"),
        Some("1:30"),
        Some("live,requeue"),
        Some("home,/data:/in:ro"),
        Some("/in"),
        Some("user"),
        Some("8G"),
    ];

    #[test]
    fn the_golden_json_is_read_and_written() {
        let golden = r#"{"v":1,"image":"debian-12","cpus":2,"mem_mib":2048,"boot_timeout_s":90,"preempt":["live","requeue"],"mounts":["home","/data:/in:ro"],"workdir":"/in","net":"user","disk_mib":8192}"#;
        let spec = VmSpec::from_options(&FULL).unwrap().unwrap();
        assert_eq!(spec.to_json(), golden);
        assert_eq!(VmSpec::from_json(golden), Ok(spec));
        assert_eq!(VmSpec::for_image("a").unwrap().to_json(), r#"{"v":1,"image":"a"}"#);
    }

    #[test]
    fn unknown_keys_other_versions_and_bad_values_are_refused() {
        for json in [
            r#"{"image":"a"}"#,
            r#"{"v":2,"image":"a"}"#,
            r#"{"v":1,"image":"a","disk":1}"#,
            r#"{"v":1,"image":"../a"}"#,
            r#"{"v":1,"image":"a","cpus":0}"#,
            r#"{"v":1,"image":"a","mem_mib":0}"#,
            r#"{"v":1,"image":"a","boot_timeout_s":0}"#,
            r#"{"v":1,"image":"a","preempt":["cancel","live"]}"#,
            r#"{"v":1,"image":"a","preempt":[]}"#,
            r#"{"v":1,"image":"a","mounts":["x"]}"#,
            r#"{"v":1,"image":"a","mounts":["/x","/x"]}"#,
            r#"{"v":1,"image":"a","workdir":"x"}"#,
            r#"{"v":1,"image":"a","net":"host"}"#,
            r#"{"v":1,"image":"a","disk_mib":0}"#,
            "[]",
        ] {
            assert!(VmSpec::from_json(json).is_err(), "{json}");
        }
    }

    #[test]
    fn options_survive_the_way_there_and_back() {
        let spec = VmSpec::from_options(&FULL).unwrap().unwrap();
        let options = spec.to_options();
        assert_eq!(
            options.iter().map(|(n, v)| format!("--{n}={v}")).collect::<Vec<_>>(),
            [
                "--vm=debian-12",
                "--vm-cpus=2",
                "--vm-mem=2G",
                "--vm-boot-timeout=90",
                "--vm-preempt=live,requeue",
                "--vm-mount=home,/data:/in:ro",
                "--vm-workdir=/in",
                "--vm-net=user",
                "--vm-disk=8G"
            ]
        );
        let texts: Vec<Option<&str>> = options.iter().map(|(_, v)| Some(v.as_str())).collect();
        assert_eq!(VmSpec::from_options(&texts.try_into().unwrap()).unwrap().unwrap(), spec);
    }

    #[test]
    fn no_option_is_no_vm_job_and_a_companion_alone_is_an_error() {
        assert_eq!(VmSpec::from_options(&[None; OPTIONS]), Ok(None));
        let error = VmSpec::from_options(&[None, None, Some("1G"), None, None, None, None, None, None]).unwrap_err();
        assert_eq!(error.to_string(), "--vm-mem: needs --vm=IMAGE as well");
    }

    #[test]
    fn image_names_are_never_paths() {
        for name in ["a", "debian-12", "Rocky_9.4", "0", &"x".repeat(64)] {
            assert_eq!(check_image_name(name), Ok(()), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            ".a",
            "-a",
            "a/b",
            "/a",
            "a b",
            "a\n",
            "ä",
            "a:b",
            "a,b",
            "a\0",
            &"x".repeat(65),
        ] {
            assert!(check_image_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn vcpus_are_whole_numbers_in_range() {
        assert_eq!(parse_cpus("4"), Ok(4));
        for text in ["", "0", "-1", "+1", "1.5", "4097", "99999999999", "two", " 2"] {
            assert_eq!(parse_cpus(text), Err(SpecError::Cpus(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn ways_have_no_repeats_and_cancel_is_last() {
        assert_eq!(
            PreemptWay::parse_list("live,save,requeue,cancel"),
            Ok(vec![Live, Save, Requeue, Cancel])
        );
        assert_eq!(PreemptWay::parse_list("cancel"), Ok(vec![Cancel]));
        assert_eq!(PreemptWay::parse_list("live,live"), Err(SpecError::WayTwice(Live)));
        assert_eq!(
            PreemptWay::parse_list("cancel,live"),
            Err(SpecError::CancelNotLast("cancel,live".into()))
        );
        for text in ["", "live,", "LIVE", "suspend"] {
            assert!(matches!(PreemptWay::parse_list(text), Err(SpecError::UnknownWay(_))), "{text}");
        }
    }

    #[test]
    fn every_refusal_names_its_option() {
        for (i, bad) in ["/etc", "0", "1.5G", "soon", "fly", "my", "my", "host", "1.5T"]
            .into_iter()
            .enumerate()
        {
            let mut texts = FULL;
            texts[i] = Some(bad);
            let error = VmSpec::from_options(&texts).unwrap_err();
            assert_eq!(error.option, VmOption::ALL[i]);
            let prefix = format!("--vm{}: '{bad}' is not ", VmOption::ALL[i].suffix());
            assert!(error.to_string().starts_with(&prefix), "{error}");
        }
    }
}
