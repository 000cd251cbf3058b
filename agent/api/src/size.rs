//! Memory sizes as Slurm writes them (`--mem`): whole numbers of MiB unless a suffix says otherwise.
use thiserror::Error;

/// Why a size was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SizeError {
    /// The text is no size at all.
    #[error("'{0}' is not a size: give a whole number of MiB, or one with a suffix K, M, G or T (for example 512, 512M or 2G)")]
    NotASize(String),
    /// The size is zero.
    #[error("'{0}' is zero: a size must be at least 1M")]
    Zero(String),
    /// The size does not fit.
    #[error("'{0}' is too large for a size")]
    TooLarge(String),
}

/// Reads a size the way Slurm's own options do: an integer in MiB, or with one of the suffixes K (rounded up), M, G and T in either case,
/// each optionally followed by `B` or `iB`. There are no fractions, and zero is refused.
///
/// # Errors
/// Says what is wrong with the text and what is allowed.
pub fn parse_mib(text: &str) -> Result<u64, SizeError> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    let bad = || SizeError::NotASize(text.to_owned());
    if digits.is_empty() {
        return Err(bad());
    }
    let large = || SizeError::TooLarge(text.to_owned());
    let number: u64 = digits.parse().map_err(|_| large())?;
    let suffix = suffix.to_ascii_lowercase();
    let unit = suffix.strip_suffix("ib").or_else(|| suffix.strip_suffix('b')).unwrap_or(&suffix);
    let mib = match unit {
        "k" => Some(number.div_ceil(1024)),
        "m" => Some(number),
        "" if suffix.is_empty() => Some(number),
        "g" => number.checked_mul(1 << 10),
        "t" => number.checked_mul(1 << 20),
        _ => return Err(bad()),
    };
    // Slurm keeps sizes below the two values it uses as marks.
    match mib {
        Some(0) => Err(SizeError::Zero(text.to_owned())),
        Some(mib) if mib < 1 << 44 => Ok(mib),
        _ => Err(large()),
    }
}

/// Writes a size so that [`parse_mib`], and Slurm, read the same number back: `512M`, `2G`, `1T`.
#[must_use]
pub fn format_mib(mib: u64) -> String {
    if mib > 0 && mib.is_multiple_of(1 << 20) {
        format!("{}T", mib >> 20)
    } else if mib > 0 && mib.is_multiple_of(1 << 10) {
        format!("{}G", mib >> 10)
    } else {
        format!("{mib}M")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_slurm_reads_them() {
        for (text, mib) in [
            ("1", 1),
            ("512", 512),
            ("512M", 512),
            ("512m", 512),
            ("512MB", 512),
            ("512MiB", 512),
            ("1K", 1),
            ("1025k", 2),
            ("2048KB", 2),
            ("2G", 2048),
            ("2gb", 2048),
            ("2GiB", 2048),
            ("1t", 1 << 20),
            ("007", 7),
        ] {
            assert_eq!(parse_mib(text), Ok(mib), "{text}");
        }
    }

    #[test]
    fn nonsense_zero_and_too_much_are_told_apart() {
        for text in [
            "", " 1", "1 G", "-1", "+1", "1.5G", "G", "1X", "1GG", "1B", "1iB", "0x10", "1G ", "٣",
        ] {
            assert_eq!(parse_mib(text), Err(SizeError::NotASize(text.to_owned())), "{text}");
        }
        for text in ["0", "0G", "000K"] {
            assert_eq!(parse_mib(text), Err(SizeError::Zero(text.to_owned())), "{text}");
        }
        for text in ["99999999999999999999", "18446744073709551615T", "99999999T"] {
            assert_eq!(parse_mib(text), Err(SizeError::TooLarge(text.to_owned())), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(mib in 1_u64..1 << 44) {
            prop_assert_eq!(parse_mib(&format_mib(mib)), Ok(mib));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,12}") {
            let _ = parse_mib(&text);
        }
    }
}
