//! mats-stream
