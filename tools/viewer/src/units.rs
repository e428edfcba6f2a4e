//! Numbers for people.

/// Bytes with three digits and the unit that suits them.
pub fn bytes(count: f64) -> String {
    let mut value = count;
    for unit in ["B", "KiB", "MiB"] {
        if value < 999.5 {
            return format!("{} {unit}", digits(value));
        }
        value /= 1024.0;
    }
    format!("{} GiB", digits(value))
}

/// Three significant digits, or all before the point; a whole number of few digits as it is.
pub(crate) fn digits(value: f64) -> String {
    let places = match value {
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{value:.places$}")
}

/// A count with its thousands apart.
pub(crate) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// Microseconds as a time since boot.
pub(crate) fn time(micros: u64) -> String {
    match micros {
        ..10_000 => format!("{micros} µs"),
        10_000..10_000_000 => format!("{} ms", digits(micros as f64 / 1e3)),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

/// Text as HTML and XML have it.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let all = [0.0, 999.0, 1000.0, 1536.0, 98.0 * 1024.0, 1048576.0, 3.0 * 1024.0 * 1048576.0];
        let said = ["0.00 B", "999 B", "0.98 KiB", "1.50 KiB", "98.0 KiB", "1.00 MiB", "3.00 GiB"];
        assert_eq!(all.map(bytes), said);
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1\u{202f}000", "1\u{202f}234\u{202f}567"]);
        assert_eq!([5, 12_000, 12_345_678].map(time), ["5 µs", "12.0 ms", "12.3 s"]);
    }
}
