//! The .proto files are the documentation of the API: nothing in them may be without a word.

/// Numbers of fields in `descriptor.proto`, of which the path to an element consists: the file's messages and services, a
/// message's fields, a service's methods.
const MESSAGES: i32 = 4;
const SERVICES: i32 = 6;
const FIELDS: i32 = 2;
const METHODS: i32 = 2;

#[test]
fn every_field_and_every_method_is_documented() {
    let files =
        ["controller", "hypervisor", "card", "console", "error"].map(|f| format!("outboard/v1/{f}.proto"));
    let compiled = protox::compile(files, ["."]).expect("the .proto files");
    let mut silent = Vec::new();
    let mut seen = 0;
    for file in compiled.file.iter().filter(|f| f.name().starts_with("outboard/")) {
        let info = file.source_code_info.as_ref().expect("comments");
        let mut check = |path: [i32; 4], name: String| {
            let location = info.location.iter().find(|l| l.path == path);
            seen += 1;
            if location.is_none_or(|l| l.leading_comments().trim().is_empty()) {
                silent.push(name);
            }
        };
        for (m, message) in (0..).zip(&file.message_type) {
            for (f, field) in (0..).zip(&message.field) {
                check([MESSAGES, m, FIELDS, f], format!("{}.{}", message.name(), field.name()));
            }
        }
        for (s, service) in (0..).zip(&file.service) {
            for (m, method) in (0..).zip(&service.method) {
                check([SERVICES, s, METHODS, m], format!("{}.{}", service.name(), method.name()));
            }
        }
    }
    assert!(seen > 150, "only {seen} fields and methods found");
    assert!(silent.is_empty(), "without a comment: {silent:?}");
}
