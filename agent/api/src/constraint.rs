//! Adds the feature of VM nodes to a job's constraint, without changing what the user asked for.
//!
//! Slurm knows one level of parentheses and one pair of brackets, and gives counts (`a*2`) a meaning of their own: `[a*1&b*1]&vm` was seen
//! to run on a node without `vm`, and `([a|b])&vm` is refused from 24.11 on. So whatever cannot be extended safely is refused here.
use thiserror::Error;

/// Why the feature cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConstraintError {
    /// Counts.
    #[error("the constraint '{0}' has node counts (*), which cannot be combined with --vm: Slurm may then pick nodes without VMs")]
    Counts(String),
    /// Brackets that are not the whole constraint.
    #[error("the constraint '{0}' mixes brackets with other terms, which cannot be combined with --vm: use one [a|b] alone")]
    Brackets(String),
    /// Parentheses beside a top-level or.
    #[error("the constraint '{0}' has parentheses beside an or (|), which cannot be combined with --vm: Slurm has no nested parentheses")]
    Parentheses(String),
    /// Not balanced, or empty.
    #[error("the constraint '{0}' is not well formed")]
    Malformed(String),
}

/// The user's constraint with `feature` added. A constraint that already demands the feature is returned as it is.
///
/// # Errors
/// When the constraint has a form that Slurm would not, or not reliably, combine with one more feature.
pub fn with_feature(constraint: Option<&str>, feature: &str) -> Result<String, ConstraintError> {
    let Some(original) = constraint.map(str::trim).filter(|c| !c.is_empty()) else {
        return Ok(feature.to_owned());
    };
    let own = || original.to_owned();
    if original.contains('*') {
        return Err(ConstraintError::Counts(own()));
    }
    let shape = Shape::of(original).ok_or_else(|| ConstraintError::Malformed(own()))?;
    if !shape.top_or && shape.conjuncts.contains(&feature) {
        return Ok(own());
    }
    if shape.brackets {
        let whole = original.starts_with('[') && original.ends_with(']') && !shape.parentheses;
        return if whole {
            Ok(format!("{original}&{feature}"))
        } else {
            Err(ConstraintError::Brackets(own()))
        };
    }
    match (shape.parentheses, shape.top_or) {
        (false, _) => Ok(format!("({original})&{feature}")),
        (true, false) => Ok(format!("{original}&{feature}")),
        (true, true) => Err(ConstraintError::Parentheses(own())),
    }
}

/// What the outermost level of a constraint looks like.
struct Shape<'a> {
    top_or: bool,
    brackets: bool,
    parentheses: bool,
    conjuncts: Vec<&'a str>,
}

impl<'a> Shape<'a> {
    /// `None` when brackets or parentheses are unbalanced or nested, or a term is empty.
    fn of(text: &'a str) -> Option<Self> {
        let mut shape = Shape {
            top_or: false,
            brackets: false,
            parentheses: false,
            conjuncts: Vec::new(),
        };
        let mut closing: Option<char> = None;
        let mut start = 0;
        let mut term_empty = true;
        for (at, c) in text.char_indices() {
            match c {
                '[' | '(' if closing.is_none() => {
                    if c == '[' {
                        if shape.brackets {
                            return None;
                        }
                        shape.brackets = true;
                    } else {
                        shape.parentheses = true;
                    }
                    if !term_empty {
                        return None;
                    }
                    closing = Some(if c == '[' { ']' } else { ')' });
                }
                // Parentheses within brackets: known to Slurm, left to the caller to refuse.
                '(' | ')' if closing == Some(']') => shape.parentheses = true,
                '[' | '(' => return None,
                ']' | ')' => {
                    if closing != Some(c) || term_empty {
                        return None;
                    }
                    closing = None;
                }
                '&' | '|' | ',' => {
                    if term_empty {
                        return None;
                    }
                    term_empty = true;
                    if closing.is_none() {
                        shape.top_or |= c == '|';
                        shape.conjuncts.push(&text[start..at]);
                        start = at + c.len_utf8();
                    }
                }
                _ => term_empty = false,
            }
        }
        if closing.is_some() || term_empty {
            return None;
        }
        shape.conjuncts.push(&text[start..]);
        Some(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_feature_is_added_without_changing_what_was_asked() {
        for (constraint, expected) in [
            (None, "vm"),
            (Some(""), "vm"),
            (Some("  "), "vm"),
            (Some("a"), "(a)&vm"),
            (Some("a&b"), "(a&b)&vm"),
            (Some("a,b"), "(a,b)&vm"),
            (Some("a|b"), "(a|b)&vm"),
            (Some("vma"), "(vma)&vm"),
            (Some("[a|b]"), "[a|b]&vm"),
            (Some("(a|b)&c"), "(a|b)&c&vm"),
            (Some("c&(a|b)"), "c&(a|b)&vm"),
            (Some("(a|b)"), "(a|b)&vm"),
        ] {
            assert_eq!(with_feature(constraint, "vm").as_deref(), Ok(expected), "{constraint:?}");
        }
    }

    #[test]
    fn a_constraint_that_demands_the_feature_is_left_alone() {
        for constraint in ["vm", "a&vm", "vm&a", "(a|b)&vm", "[a|b]&vm", "vm,a"] {
            assert_eq!(with_feature(Some(constraint), "vm").as_deref(), Ok(constraint));
        }
        assert_eq!(
            with_feature(Some("a|vm"), "vm").as_deref(),
            Ok("(a|vm)&vm"),
            "an or does not demand it"
        );
        assert_eq!(with_feature(Some("[a|vm]"), "vm").as_deref(), Ok("[a|vm]&vm"));
    }

    #[test]
    fn what_slurm_would_not_combine_is_refused() {
        use ConstraintError as E;
        let refused = |c: &str| with_feature(Some(c), "vm").unwrap_err();
        for c in ["a*2", "[a*1&b*1]", "[a*1&b*1]&vm", "a&b*4"] {
            assert_eq!(refused(c), E::Counts(c.to_owned()), "{c}");
        }
        for c in ["[a|b]&c", "c&[a|b]", "[(a&b)|c]", "[a|b]|vm"] {
            assert_eq!(refused(c), E::Brackets(c.to_owned()), "{c}");
        }
        for c in ["(a&b)|c", "c|(a&b)", "(a&b)|(c&d)"] {
            assert_eq!(refused(c), E::Parentheses(c.to_owned()), "{c}");
        }
        for c in [
            "(a",
            "a)",
            "[a",
            "a]",
            "((a|b)&c)",
            "([a|b])",
            "[a]|[b]",
            "a&",
            "&a",
            "a||b",
            "()",
            "[]",
            "a(b)",
            "(a|b]",
        ] {
            assert_eq!(refused(c), E::Malformed(c.to_owned()), "{c}");
        }
    }
}
