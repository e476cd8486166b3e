//! One colour per system, the same in every chart.
//!
//! Hue says the kind (blue: our card, green: the same engine in the VMM, orange: QEMU, purple and yellow: halves of both),
//! lightness and dashes tell systems of a kind apart, also for those who see few hues. Every mark is labelled besides.

use std::fmt::Write;

use crate::results::Results;

/// Name, colour on white, colour on black, dashes of its lines.
const KNOWN: [(&str, &str, &str, &str); 15] = [
    ("card-poll", "#0b5fa5", "#64b1f5", "none"),
    ("card", "#0b5fa5", "#64b1f5", "none"),
    ("card-adaptive", "#3a97dd", "#3f8fd4", "6 3"),
    ("card-irq", "#82bdea", "#a9d4f9", "2 2"),
    ("card-qcow2", "#3a97dd", "#3f8fd4", "2 2"),
    ("card-groups", "#14488a", "#8fb4e8", "6 3"),
    ("thread", "#00735a", "#2fbf95", "none"),
    ("inline", "#55b897", "#8fe0c3", "6 3"),
    ("qemu", "#b8470b", "#f0803c", "none"),
    ("qemu-main-loop", "#e38a55", "#f7b183", "6 3"),
    ("qemu-card", "#75389c", "#b884db", "none"),
    ("outboard-qsd", "#b184cc", "#d9b8ec", "6 3"),
    ("qemu-qsd", "#c99700", "#f2c14e", "none"),
    ("testpmd", "#8a6d00", "#d8b93a", "2 2"),
    ("host", "#636a73", "#a2a9b3", "none"),
];

/// For systems that only an adapter knows, in order of appearance.
const OTHERS: [(&str, &str, &str); 6] = [
    ("#a3195b", "#ee6aa7", "none"),
    ("#5f7a00", "#b3cf4a", "none"),
    ("#00747d", "#45c3cd", "none"),
    ("#7b4b3a", "#c79a88", "none"),
    ("#a3195b", "#ee6aa7", "6 3"),
    ("#5f7a00", "#b3cf4a", "6 3"),
];

/// Class of a system's marks.
pub(crate) fn class(results: &Results, system: &str) -> String {
    match results.systems.iter().position(|s| s.name == system) {
        Some(i) => format!("s{i}"),
        None => "unknown".to_owned(),
    }
}

/// Style sheet of the classes.
pub(crate) fn style(results: &Results) -> String {
    let mut others = OTHERS.iter().cycle();
    let (mut light, mut dark) = (String::new(), String::new());
    for (i, system) in results.systems.iter().enumerate() {
        let known = KNOWN.iter().find(|k| k.0 == system.name).map(|k| (k.1, k.2, k.3));
        let (on_white, on_black, dashes) = known.or_else(|| others.next().copied()).unwrap_or(OTHERS[0]);
        // Writing to a string does not fail.
        let _ = write!(light, ".s{i}{{--c:{on_white};--d:{dashes}}}");
        let _ = write!(dark, ".s{i}{{--c:{on_black}}}");
    }
    format!("{light}@media (prefers-color-scheme:dark){{@media screen{{{dark}}}}}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::report::fixture;

    #[test]
    fn every_system_has_its_own_colours() {
        let mut results = fixture::results(1);
        for name in ["firecracker", "cloud-hypervisor"] {
            results.systems[0].name = name.to_owned();
            results.systems.push(results.systems[0].clone());
        }
        let style = style(&results);
        let light: BTreeSet<_> =
            style.split("--c:").skip(1).filter_map(|s| s.split([';', '}']).next()).collect();
        // The first was renamed to the last.
        assert_eq!(light.len(), 2 * results.systems.len(), "{style}");
        assert_eq!(class(&results, "thread"), "s3");
        assert_eq!(class(&results, "nothing"), "unknown");
    }
}
