//! Fault points: places between two effects at which a test can end the agent or make an effect fail.
//!
//! Every effect has a point before and one after it: [`points`](super::points) and [`cluster::points`](crate::cluster::points) make them, and
//! `slurm-vmd --fault-points` lists them. The environment variable `SLURM_VM_FAULT=POINT=ACT[@N]` arms one: ACT is `abort` (end the process
//! at once, as a power cut would) or `fail` (the effect reports a failure), at its Nth passing (1). Several are
//! separated by commas. Unarmed points cost one look at an empty list.
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

/// Environment variable that arms fault points.
pub const VARIABLE: &str = "SLURM_VM_FAULT";

/// What a fault point does when it is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Abort,
    Fail,
}

#[derive(Debug)]
struct Armed {
    point: String,
    act: Act,
    left: AtomicU32,
    forever: bool,
}

/// The armed fault points of this process.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    armed: Arc<Vec<Armed>>,
    next: Arc<AtomicU32>,
}

impl Faults {
    /// Those of the environment; `known` are the points that there are.
    ///
    /// # Errors
    /// A line that names the part that is not understood, or the point that does not exist.
    pub fn from_environment(known: &[String]) -> Result<Self, String> {
        let Ok(text) = std::env::var(VARIABLE) else {
            return Ok(Self::default());
        };
        let faults = Self::parse(&text)?;
        match faults.armed.iter().find(|a| !known.contains(&a.point)) {
            Some(a) => Err(format!(
                "{VARIABLE}: there is no fault point `{}` (`slurm-vmd --fault-points` lists them)",
                a.point
            )),
            None => Ok(faults),
        }
    }

    /// Parses `POINT=ACT[@N]`, comma-separated; `@*` hits at every passing.
    ///
    /// # Errors
    /// A line that names the part that is not understood.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut armed = Vec::new();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let bad = || format!("{VARIABLE}: `{part}` is not POINT=abort|fail[@N]");
            let (point, act) = part.split_once('=').ok_or_else(bad)?;
            let (act, n) = act.split_once('@').unwrap_or((act, "1"));
            let act = match act {
                "abort" => Act::Abort,
                "fail" => Act::Fail,
                _ => return Err(bad()),
            };
            let forever = n == "*";
            let left = if forever {
                1
            } else {
                n.parse().ok().filter(|n| *n > 0).ok_or_else(bad)?
            };
            armed.push(Armed {
                point: point.into(),
                act,
                left: AtomicU32::new(left),
                forever,
            });
        }
        Ok(Self {
            armed: Arc::new(armed),
            next: Arc::default(),
        })
    }

    /// Makes the `n`th point that is passed from now on fail, whichever it is; 0: none. Returns what is left of the last such order.
    pub fn fail_nth(&self, n: u32) -> u32 {
        self.next.swap(n, Ordering::SeqCst)
    }

    /// Passes a point.
    ///
    /// # Errors
    /// When the point is armed to fail, a fragment saying so. When armed to abort, it does not return.
    pub fn pass(&self, point: &str) -> Result<(), String> {
        if self.next.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)) == Ok(1) {
            return Err(format!("fault injected at {point}"));
        }
        for a in self.armed.iter().filter(|a| a.point == point) {
            let hit = a.forever || a.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)) == Ok(1);
            if hit {
                match a.act {
                    Act::Abort => {
                        log::error!("fault point {point}: aborting");
                        std::process::abort();
                    }
                    Act::Fail => return Err(format!("fault injected at {point}")),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_armed_point_fails_at_its_nth_passing_only() {
        let f = Faults::parse("a.before=fail@2").unwrap();
        assert!(f.pass("a.before").is_ok());
        assert!(f.pass("b.before").is_ok());
        assert!(f.pass("a.before").is_err());
        assert!(f.pass("a.before").is_ok());
    }

    #[test]
    fn a_point_that_is_not_understood_is_named() {
        assert!(Faults::parse("a.before=explode").unwrap_err().contains("explode"));
    }
}
