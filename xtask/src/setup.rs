//! Installs what the machine lacks.
