//! Guest helper.
fn main() {}
