//! Compiles the .proto files with protox: no protoc, no network.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["common", "block", "lane", "signal", "worker", "admin"]
        .map(|name| format!("terrace/v1/{name}.proto"));
    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("terrace.bin"), prost_encode(&descriptors))?;
    tonic_prost_build::configure().bytes(".terrace.v1").compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=terrace");
    Ok(())
}

/// The descriptor set, for server reflection.
fn prost_encode(descriptors: &impl prost::Message) -> Vec<u8> {
    descriptors.encode_to_vec()
}
