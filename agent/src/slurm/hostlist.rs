//! Slurm's compressed lists: host names (`n[1-3,05],login`) and numbers (`0-1,3`).

use super::SlurmError;

/// More than any cluster has; a longer list is a mistake or an attack on memory.
const MOST: usize = 100_000;

/// Expands a host list. Every bracket group is expanded, also two in one name (`r[1-2]n[1-2]`); leading zeros are kept.
///
/// # Errors
/// [`SlurmError::Parse`] for unbalanced brackets, empty names, or a list of more than 100,000 names.
pub fn expand_hosts(text: &str) -> Result<Vec<String>, SlurmError> {
    let bad = || SlurmError::parse("host list", text);
    let mut out = Vec::new();
    if text.is_empty() {
        return Ok(out);
    }
    for part in split_outside_brackets(text).ok_or_else(bad)? {
        if part.is_empty() || part.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(bad());
        }
        expand_one("", part, &mut out).ok_or_else(bad)?;
    }
    Ok(out)
}

fn split_outside_brackets(text: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '[' if inside => return None,
            '[' => inside = true,
            ']' if !inside => return None,
            ']' => inside = false,
            ',' if !inside => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (!inside).then_some(parts)
}

fn expand_one(prefix: &str, rest: &str, out: &mut Vec<String>) -> Option<()> {
    let Some((head, tail)) = rest.split_once('[') else {
        out.push(format!("{prefix}{rest}"));
        return (out.len() <= MOST).then_some(());
    };
    let (group, tail) = tail.split_once(']')?;
    for item in group.split(',') {
        let (low, high) = item.split_once('-').unwrap_or((item, item));
        let digits = |s: &str| !s.is_empty() && s.len() <= 9 && s.bytes().all(|b| b.is_ascii_digit());
        if !digits(low) || !digits(high) {
            return None;
        }
        let (from, to): (u32, u32) = (low.parse().ok()?, high.parse().ok()?);
        if from > to || (to - from) as usize >= MOST {
            return None;
        }
        for n in from..=to {
            expand_one(&format!("{prefix}{head}{n:0width$}", width = low.len()), tail, out)?;
        }
    }
    Some(())
}

/// Expands a list of numbers such as `CPU_IDs=0-1,3`.
///
/// # Errors
/// [`SlurmError::Parse`] if it is not such a list.
pub fn expand_numbers(text: &str) -> Result<Vec<u32>, SlurmError> {
    let bad = || SlurmError::parse("number list", text);
    let mut out = Vec::new();
    if text.is_empty() {
        return Ok(out);
    }
    for item in text.split(',') {
        let (low, high) = item.split_once('-').unwrap_or((item, item));
        let (low, high): (u32, u32) = (low.parse().map_err(|_| bad())?, high.parse().map_err(|_| bad())?);
        if low > high || (high - low) as usize >= MOST || out.len() > MOST {
            return Err(bad());
        }
        out.extend(low..=high);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_lists_are_expanded_with_their_zeros() {
        assert_eq!(expand_hosts("n[1-3,5]").unwrap(), ["n1", "n2", "n3", "n5"]);
        assert_eq!(expand_hosts("n[08-11]x,login").unwrap(), ["n08x", "n09x", "n10x", "n11x", "login"]);
        assert_eq!(expand_hosts("r[1-2]n[1-2]").unwrap(), ["r1n1", "r1n2", "r2n1", "r2n2"]);
        assert_eq!(expand_hosts("").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn broken_and_huge_host_lists_are_refused() {
        for bad in [
            "n[1-",
            "n1]",
            "n[3-1]",
            "n[a-b]",
            "n[1-999999999]",
            "n[1-999][1-999][1-999]",
            "a,,b",
            "a b",
            "n[[1]]",
        ] {
            assert!(matches!(expand_hosts(bad), Err(SlurmError::Parse { .. })), "{bad}");
        }
    }

    #[test]
    fn number_lists_are_expanded() {
        assert_eq!(expand_numbers("0-1,3").unwrap(), [0, 1, 3]);
        assert_eq!(expand_numbers("").unwrap(), Vec::<u32>::new());
        assert!(expand_numbers("3-1").is_err() && expand_numbers("x").is_err() && expand_numbers("0-4000000000").is_err());
    }
}
