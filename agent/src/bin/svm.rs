//! svm
fn main() {}
