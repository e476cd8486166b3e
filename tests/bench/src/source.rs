//! Size of a crate's source.

use std::path::Path;

/// Lines of code of the Rust files below `dir`: not blank, not comment, not tests.
pub(crate) fn lines_of_code(dir: &Path) -> std::io::Result<usize> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sum += lines_of_code(&path)?;
        } else if path.extension().is_some_and(|e| e == "rs") && path.file_stem().is_none_or(|s| s != "tests")
        {
            sum += count(&std::fs::read_to_string(path)?);
        }
    }
    Ok(sum)
}

/// The workspace keeps a file's unit tests at its end, in one module behind `#[cfg(test)]`.
fn count(source: &str) -> usize {
    let mut lines = source.lines().map(str::trim).peekable();
    let mut sum = 0;
    while let Some(line) = lines.next() {
        if line == "#[cfg(test)]"
            && lines.peek().is_some_and(|next| next.starts_with("mod ") && next.ends_with('{'))
        {
            break;
        }
        sum += usize::from(!line.is_empty() && !line.starts_with("//"));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_blank_lines_and_tests_do_not_count() {
        let source =
            "//! Doc\n\nfn a() {\n    // why\n    b();\n}\n\n#[cfg(test)]\nmod tests {\n    fn c() {}\n}\n";
        assert_eq!(count(source), 3);
    }

    #[test]
    fn test_only_items_in_the_middle_count() {
        assert_eq!(count("#[cfg(test)]\nuse x;\nfn a() {}\n"), 3);
    }
}
