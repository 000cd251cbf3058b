//! Whether a node's features satisfy a job's constraint (`sbatch --constraint`), for one node at a time.
//!
//! Slurm reads `&` and `|` from left to right, and knows `( )` and `[ ]`. Brackets mean "the same one on all nodes", a count
//! (`a*2`) how many nodes: of one node both say no more than the plain name.

/// Whether one node with these features may be given to a job with that constraint. `None`: it is not understood.
#[must_use]
pub fn satisfies(constraint: Option<&str>, features: &[String]) -> Option<bool> {
    let Some(text) = constraint.map(str::trim).filter(|c| !c.is_empty()) else {
        return Some(true);
    };
    let mut reader = Reader { rest: text, features };
    let value = reader.terms(0)?;
    reader.rest.is_empty().then_some(value)
}

/// Brackets within brackets, at most: Slurm has two.
const DEEPEST: u32 = 8;

struct Reader<'a> {
    rest: &'a str,
    features: &'a [String],
}

impl<'a> Reader<'a> {
    /// `term { (& | |) term }`
    fn terms(&mut self, depth: u32) -> Option<bool> {
        let mut value = self.term(depth)?;
        loop {
            if self.eat('&') {
                let next = self.term(depth)?;
                value = value && next;
            } else if self.eat('|') {
                let next = self.term(depth)?;
                value = value || next;
            } else {
                return Some(value);
            }
        }
    }

    /// A name or a bracket, and what may stand behind it.
    fn term(&mut self, depth: u32) -> Option<bool> {
        if depth > DEEPEST {
            return None;
        }
        let value = if self.eat('(') {
            let inner = self.terms(depth + 1)?;
            self.eat(')').then_some(inner)?
        } else if self.eat('[') {
            let inner = self.terms(depth + 1)?;
            self.eat(']').then_some(inner)?
        } else {
            let name = self.take(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '=' | ':' | '/' | '+' | '@'));
            if name.is_empty() {
                return None;
            }
            self.features.iter().any(|f| f == name)
        };
        if self.eat('*') {
            let count = self.take(|c| c.is_ascii_digit());
            if count.is_empty() {
                return None;
            }
        }
        Some(value)
    }

    fn eat(&mut self, c: char) -> bool {
        let Some(rest) = self.rest.trim_start().strip_prefix(c) else {
            return false;
        };
        self.rest = rest.trim_start();
        true
    }

    fn take(&mut self, is: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !is(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constraint_is_read_as_slurm_reads_it_for_one_node() {
        let features = ["vm".to_owned(), "icelake".to_owned()];
        for (constraint, expected) in [
            ("", Some(true)),
            ("vm", Some(true)),
            ("vm&icelake", Some(true)),
            ("vm&rome", Some(false)),
            ("rome|icelake", Some(true)),
            ("(rome|icelake)&vm", Some(true)),
            ("[rome|icelake]&vm", Some(true)),
            ("[rome|milan]&vm", Some(false)),
            // From left to right: (rome & vm) | icelake.
            ("rome&vm|icelake", Some(true)),
            ("icelake|rome&milan", Some(false)),
            ("vm*2", Some(true)),
            ("[rome*1&vm*2]", Some(false)),
            ("vm&", None),
            ("(vm", None),
            ("vm)", None),
            ("vm*", None),
            ("vm,icelake", None),
            ("((((((((((vm))))))))))", None),
        ] {
            assert_eq!(satisfies(Some(constraint), &features), expected, "{constraint}");
        }
        assert_eq!(satisfies(None, &[]), Some(true));
        assert_eq!(satisfies(Some("vm"), &["vmx".to_owned()]), Some(false));
    }
}
