//! Single values as HTML: names, numbers, quantities, bars. Every text that a record holds is shown by one of these.

use std::fmt::Display;

use maud::{Markup, html};

use crate::report::units::{Bytes, Escaped, Seconds};

/// A name or a line from a record, cut at 200 characters, with control and reordering characters spelled out.
pub(super) fn text(text: &str) -> Escaped<'_> {
    Escaped(text)
}

/// A name that stands for itself: whatever its script, it does not move what is around it. A long one may be
/// broken after its dots, slashes and underscores.
pub(super) fn name(name: &str) -> Markup {
    let shown = text(name).to_string();
    html! {
        bdi {
            @if name.is_empty() { "(empty name)" }
            @for (k, part) in shown.split_inclusive(['.', '/', '_']).enumerate() {
                @if k > 0 { wbr; }
                (part)
            }
        }
    }
}

/// Nothing was recorded.
pub(super) fn absent() -> Markup {
    html! { span.absent title="not in the record" { "–" } }
}

/// The record has `null`: JSON knows no NaN and no infinity.
pub(super) fn not_finite() -> Markup {
    html! { span.bad title="null in the record: NaN or infinite" { "not finite" } }
}

/// A finite number to three or four digits: `0.01209`, `1.39e-3`.
pub(super) fn digits(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        a if (1e-2..1.0).contains(&a) => format!("{x:.4}"),
        a if (1.0..1e2).contains(&a) => format!("{x:.3}"),
        a if (1e2..1e5).contains(&a) => format!("{x:.1}"),
        _ => format!("{x:.2e}"),
    }
}

pub(super) fn number(x: Option<f64>) -> Markup {
    match x {
        None => absent(),
        Some(x) if x.is_finite() => html! { (digits(x)) },
        Some(_) => not_finite(),
    }
}

/// `shown(x)`, unless `x` is not finite.
pub(super) fn quantity<T: Display>(x: f64, shown: impl FnOnce(f64) -> T) -> Markup {
    if x.is_finite() {
        html! { (shown(x).to_string()) }
    } else {
        not_finite()
    }
}

pub(super) fn seconds(x: Option<f64>) -> Markup {
    x.map_or_else(absent, |x| quantity(x, Seconds))
}

pub(super) fn bytes(x: Option<u64>) -> Markup {
    x.map_or_else(absent, |x| html! { (Bytes(x).to_string()) })
}

/// `1 tensor`, `2 tensors`.
pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// How much lower `last` is than `first`, in parts of `first`: 0.25 where a quarter is gone. `None` where that
/// says nothing.
pub(super) fn decrease(first: Option<f64>, last: Option<f64>) -> Option<f64> {
    let (first, last) = (first?, last?);
    let part = (first - last) / first;
    (first > 0.0 && part.is_finite()).then_some(part)
}

/// `−72.3 %` for a decrease of 0.723; a rise is marked.
pub(super) fn change(decrease: f64) -> Markup {
    let percent = -100.0 * decrease;
    let text = if percent.abs() < 1e5 {
        format!("{:.1} %", percent.abs())
    } else {
        format!("{:.1e} %", percent.abs())
    };
    html! {
        @if percent > 0.05 { span.bad title="it rose" { "+" (text) } }
        @else if percent > -0.05 { "0.0 %" }
        @else { "−" (text) }
    }
}

/// A bar of parts, each a share of the whole width and the class that colours it. For the eye alone: the figures
/// stand beside it.
pub(super) fn bar(parts: &[(f64, &str)]) -> Markup {
    let mut left = 0.0;
    html! {
        svg.bar viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true" {
            @for (share, class) in parts {
                @let width = if share.is_finite() { (share * 100.0).clamp(0.0, 100.0 - left) } else { 0.0 };
                @if width >= 0.005 {
                    rect class=(class) x=(format!("{left:.2}")) width=(format!("{width:.2}")) height="1" {}
                }
                @let () = left += width;
            }
        }
    }
}

/// Says that a list was cut, if it was.
pub(super) fn cut(shown: usize, all: usize, what: &str) -> Markup {
    html! {
        @if all > shown {
            p.note { "The first " (shown) " of " (all) " " (what) "; the record has all of them." }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let shown = |x: f64| number(Some(x)).into_string();
        assert_eq!(shown(0.0), "0");
        assert_eq!(shown(-0.012_094), "-0.0121");
        assert_eq!(shown(12.3456), "12.346");
        assert_eq!(shown(1.5e-3), "1.50e-3");
        assert_eq!(shown(1e300), "1.00e300");
        assert!(shown(f64::NAN).contains("not finite") && shown(f64::INFINITY).contains("not finite"));
        assert!(number(None).into_string().contains("not in the record"));
        assert!(seconds(Some(f64::NAN)).into_string().contains("not finite"));
    }

    #[test]
    fn names_are_escaped_twice_over() {
        let html = name("<b>\"&'\u{202e}\n").into_string();
        assert_eq!(html, "<bdi>&lt;b&gt;&quot;&amp;'\\u{202e}\\n</bdi>");
        assert_eq!(name("a.b/c_d").into_string(), "<bdi>a.<wbr>b/<wbr>c_<wbr>d</bdi>");
        assert!(name("").into_string().contains("empty"));
    }

    #[test]
    fn decreases() {
        assert_eq!(decrease(Some(4.0), Some(1.0)), Some(0.75));
        assert_eq!(decrease(Some(0.0), Some(0.0)), None);
        assert_eq!(decrease(Some(1.0), Some(f64::NAN)), None);
        assert_eq!(decrease(None, Some(1.0)), None);
        assert_eq!(change(0.75).into_string(), "−75.0 %");
        assert_eq!(change(0.0).into_string(), "0.0 %");
        assert!(change(-0.5).into_string().contains("+50.0 %"));
    }

    #[test]
    fn bars_never_pass_their_end() {
        let html = bar(&[(0.75, "a"), (0.5, "b"), (f64::NAN, "c")]).into_string();
        assert!(
            html.contains(r#"x="0.00" width="75.00""#) && html.contains(r#"x="75.00" width="25.00""#),
            "{html}"
        );
        assert!(!html.contains("NaN"));
    }
}
