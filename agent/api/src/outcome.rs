//! The exit codes of a `--vm` task that are not the program's own. A program may use the same numbers; the log says which it was.

/// One exit code of the shim and what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code.
    pub code: u8,
    /// A short name, as `svm` and the log write it.
    pub name: &'static str,
    /// One sentence for users.
    pub meaning: &'static str,
}

/// The VM crashed or was powered off while the program ran.
pub const GUEST_LOST: u8 = 123;
/// The guest did not come up within the boot timeout.
pub const BOOT_TIMEOUT: u8 = 124;
/// The node or its agent failed, and the job could not be requeued any more.
pub const NODE_FAULT: u8 = 125;
/// The request or the image was refused.
pub const REFUSED: u8 = 126;
/// The program was not found in the guest, as a shell reports it.
pub const NOT_FOUND: u8 = 127;

/// All of them, in order.
pub const OUTCOMES: [Outcome; 5] = [
    Outcome {
        code: GUEST_LOST,
        name: "guest-lost",
        meaning: "the VM crashed or was powered off while the program ran",
    },
    Outcome {
        code: BOOT_TIMEOUT,
        name: "boot-timeout",
        meaning: "the guest did not come up within the boot timeout",
    },
    Outcome {
        code: NODE_FAULT,
        name: "node-fault",
        meaning: "the node or its agent failed, and the attempts to requeue the job are used up",
    },
    Outcome {
        code: REFUSED,
        name: "refused",
        meaning: "the request or the image was refused",
    },
    Outcome {
        code: NOT_FOUND,
        name: "not-found",
        meaning: "the program was not found in the guest, as a shell reports it",
    },
];

/// Looks an exit code up.
#[must_use]
pub fn by_code(code: u8) -> Option<&'static Outcome> {
    OUTCOMES.iter().find(|o| o.code == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_lists_every_outcome_in_order() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/options.md")).expect("docs/options.md");
        let rows: Vec<String> = page.lines().filter(|l| l.starts_with("| 12")).map(str::to_owned).collect();
        let expected: Vec<String> = OUTCOMES
            .iter()
            .map(|o| format!("| {} | {} | {} |", o.code, o.name, o.meaning))
            .collect();
        assert_eq!(rows, expected);
    }

    #[test]
    fn a_code_is_found_and_others_are_not() {
        assert_eq!(by_code(NODE_FAULT).map(|o| o.name), Some("node-fault"));
        assert_eq!(by_code(1), None);
    }
}
