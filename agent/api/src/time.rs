//! Spans of time in options. A bare number is seconds, unlike `--time`, where it is minutes: a boot is a matter of seconds.
use thiserror::Error;

/// Why a span of time was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TimeError {
    /// The text is no span of time.
    #[error("'{0}' is not a time: give seconds, or MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")]
    NotATime(String),
    /// The time is zero.
    #[error("'{0}' is no time at all: give at least one second")]
    Zero(String),
    /// The time does not fit.
    #[error("'{0}' is too long: at most 365 days")]
    TooLong(String),
}

/// The longest span that an option may ask for: 365 days.
pub const MAX_SECONDS: u32 = 365 * 86_400;

/// Reads a span of time: seconds, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`. Zero is refused.
///
/// # Errors
/// Says what is wrong with the text and what is allowed.
pub fn parse_seconds(text: &str) -> Result<u32, TimeError> {
    let bad = || TimeError::NotATime(text.to_owned());
    let number = |part: &str| {
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        part.parse::<u64>().map_err(|_| TimeError::TooLong(text.to_owned()))
    };
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(number(days)?), clock),
        None => (None, text),
    };
    let parts = clock.split(':').map(number).collect::<Result<Vec<u64>, _>>()?;
    let (hours, minutes, seconds) = match (days, parts.as_slice()) {
        (None, [s]) => (0, 0, *s),
        (None, [m, s]) => (0, *m, *s),
        (_, [h, m, s]) => (*h, *m, *s),
        (Some(_), [h]) => (*h, 0, 0),
        (Some(_), [h, m]) => (*h, *m, 0),
        _ => return Err(bad()),
    };
    let total = [(days.unwrap_or(0), 86_400), (hours, 3600), (minutes, 60), (seconds, 1)]
        .iter()
        .try_fold(0_u64, |sum, (n, unit)| sum.checked_add(n.checked_mul(*unit)?));
    match total.and_then(|t| u32::try_from(t).ok()) {
        Some(0) => Err(TimeError::Zero(text.to_owned())),
        Some(t) if t <= MAX_SECONDS => Ok(t),
        _ => Err(TimeError::TooLong(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_bare_number_is_seconds_and_the_other_forms_are_slurms() {
        for (text, seconds) in [
            ("90", 90),
            ("1:30", 90),
            ("02:00", 120),
            ("1:00:00", 3600),
            ("0-1", 3600),
            ("1-0", 86_400),
            ("1-2:03", 86_400 + 2 * 3600 + 180),
            ("1-02:03:04", 86_400 + 2 * 3600 + 184),
            ("365-0", MAX_SECONDS),
        ] {
            assert_eq!(parse_seconds(text), Ok(seconds), "{text}");
        }
    }

    #[test]
    fn nonsense_zero_and_too_long_are_told_apart() {
        for text in ["", "x", "1.5", "-1", "+5", "1:", ":1", "1:2:3:4", "1-", "-", "1-2-3", "5s", "1 "] {
            assert_eq!(parse_seconds(text), Err(TimeError::NotATime(text.to_owned())), "{text}");
        }
        for text in ["0", "0:00", "0-0"] {
            assert_eq!(parse_seconds(text), Err(TimeError::Zero(text.to_owned())), "{text}");
        }
        for text in ["99999999999999999999", "366-0", "31536001"] {
            assert_eq!(parse_seconds(text), Err(TimeError::TooLong(text.to_owned())), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,12}") {
            let _ = parse_seconds(&text);
        }
    }
}
