//! How quantities and foreign names are shown to people: bytes, seconds, flops, rates, escaped names.
//!
//! A leaf module: every message and table in the crate may use it, it uses nothing of ours. It never
//! parses; what a user types (`8GiB`) is read where the command line is read.

use std::fmt;
use std::path::Path;

/// A number of bytes, shown in binary units with one decimal: `512 B`, `1.5 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let (value, unit) = scaled(self.0 as f64 / 1024.0, 1024.0, &UNITS);
        f.pad(&format!("{value:.1} {unit}"))
    }
}

/// A duration in seconds: `250 µs`, `3.20 s`, `4 min 05 s`, `2 h 03 min`, `3 d 04 h`; `unknown` if
/// negative or not finite.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Seconds(pub f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0;
        if !s.is_finite() || s < 0.0 {
            return f.pad("unknown");
        }
        let text = if s < 0.9995e-3 {
            format!("{:.0} µs", s * 1e6)
        } else if s < 0.9995 {
            format!("{:.0} ms", s * 1e3)
        } else if s < 9.995 {
            format!("{s:.2} s")
        } else if s < 59.95 {
            format!("{s:.1} s")
        } else {
            // A cast saturates, so an absurd duration is shown as an absurd number of days.
            let whole = s.round() as u64;
            let (minutes, hours, days) = (whole / 60, whole / 3600, whole / 86_400);
            match (hours, days) {
                (0, _) => format!("{minutes} min {:02} s", whole % 60),
                (_, 0) => format!("{hours} h {:02} min", minutes % 60),
                _ => format!("{days} d {:02} h", hours % 24),
            }
        };
        f.pad(&text)
    }
}

/// A count of floating-point operations, in decimal units: `1.33 PFLOP`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Flops(pub f64);

impl fmt::Display for Flops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&decimal(self.0, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]))
    }
}

/// Floating-point operations a second: `390.00 GFLOP/s`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct FlopRate(pub f64);

impl fmt::Display for FlopRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&decimal(self.0, &["FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s", "EFLOP/s"]))
    }
}

/// Bytes a second, in decimal units as disks and links are quoted: `2.50 GB/s`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct ByteRate(pub f64);

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&decimal(self.0, &["B/s", "kB/s", "MB/s", "GB/s", "TB/s", "PB/s", "EB/s"]))
    }
}

/// `value` in the largest unit that leaves at least 1, with two decimals; `unknown` if negative or not
/// finite.
fn decimal(value: f64, units: &[&'static str]) -> String {
    if !value.is_finite() || value < 0.0 {
        return "unknown".to_owned();
    }
    let (value, unit) = scaled(value, 1000.0, units);
    if unit == units[0] { format!("{value:.0} {unit}") } else { format!("{value:.2} {unit}") }
}

/// Divides by `base` until the number, as it will be printed, is below `base`. The slack keeps `1024.0
/// KiB` away.
fn scaled(mut value: f64, base: f64, units: &[&'static str]) -> (f64, &'static str) {
    let mut unit = 0;
    while value >= base - 0.05 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    (value, units[unit])
}

/// A name from outside (a tensor's, a file's) made safe for one line of a terminal: control characters,
/// line separators and characters that reorder text are escaped, and it is cut at 200 characters.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(pub &'a str);

/// Names longer than this many characters are cut where they are shown.
const SHOWN_CHARS: usize = 200;

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_escaped(f, self.0, SHOWN_CHARS)
    }
}

/// A path as typed, escaped like [`Escaped`] but never cut: the reader needs all of it.
#[derive(Clone, Copy, Debug)]
pub struct EscapedPath<'a>(pub &'a Path);

impl fmt::Display for EscapedPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_escaped(f, &self.0.to_string_lossy(), usize::MAX)
    }
}

fn write_escaped(f: &mut fmt::Formatter<'_>, text: &str, limit: usize) -> fmt::Result {
    use fmt::Write as _;
    for (position, c) in text.chars().enumerate() {
        if position == limit {
            return f.write_char('…');
        }
        if reorders_or_controls(c) {
            write!(f, "{}", c.escape_default())?;
        } else {
            f.write_char(c)?;
        }
    }
    Ok(())
}

/// Control characters, the line and paragraph separators, the bidirectional controls and the byte order
/// mark.
fn reorders_or_controls(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_binary_units() {
        let shown = |n: u64| Bytes(n).to_string();
        assert_eq!(shown(0), "0 B");
        assert_eq!(shown(1023), "1023 B");
        assert_eq!(shown(1024), "1.0 KiB");
        assert_eq!(shown(3 << 29), "1.5 GiB");
        assert_eq!(shown((1 << 20) - 1), "1.0 MiB", "never 1024.0 KiB");
        assert_eq!(shown(u64::MAX), "16.0 EiB");
        assert_eq!(format!("{:>9}", Bytes(1024)), "  1.0 KiB");
    }

    #[test]
    fn seconds_from_microseconds_to_days() {
        let shown = |s: f64| Seconds(s).to_string();
        assert_eq!(shown(0.0), "0 µs");
        assert_eq!(shown(0.25), "250 ms");
        assert_eq!(shown(3.2), "3.20 s");
        assert_eq!(shown(59.96), "1 min 00 s");
        assert_eq!(shown(245.0), "4 min 05 s");
        assert_eq!(shown(7380.0), "2 h 03 min");
        assert_eq!(shown(86_400.0 * 3.0 + 4.0 * 3600.0), "3 d 04 h");
        assert_eq!(shown(f64::NAN), "unknown");
        assert_eq!(shown(-1.0), "unknown");
    }

    #[test]
    fn flops_and_rates_in_decimal_units() {
        assert_eq!(Flops(1.33e15).to_string(), "1.33 PFLOP");
        assert_eq!(Flops(12.0).to_string(), "12 FLOP");
        assert_eq!(FlopRate(390e9).to_string(), "390.00 GFLOP/s");
        assert_eq!(ByteRate(2.5e9).to_string(), "2.50 GB/s");
        assert_eq!(ByteRate(f64::INFINITY).to_string(), "unknown");
    }

    #[test]
    fn names_stay_on_one_line_and_are_cut() {
        assert_eq!(Escaped("a\nb\u{1b}[31m\u{202e}\0").to_string(), "a\\nb\\u{1b}[31m\\u{202e}\\u{0}");
        assert_eq!(Escaped("größe").to_string(), "größe");
        let long = "x".repeat(64 << 10);
        assert_eq!(Escaped(&long).to_string().chars().count(), SHOWN_CHARS + 1);
        assert_eq!(EscapedPath(Path::new("a dir/ü\n")).to_string(), "a dir/ü\\n");
    }
}
