// swift-tools-version: 5.9
import PackageDescription

/// The ExecuTorch backend, in a package of its own: only apps that want it fetch ExecuTorch. Its static libraries register
/// kernels and backends when they are loaded, so the app must be linked with `-all_load`.
let package = Package(
    name: "GemmaExecutorch",
    platforms: [.iOS("18.0"), .macOS("15.0")],
    products: [.library(name: "GemmaExecutorch", targets: ["GemmaExecutorch"])],
    dependencies: [
        .package(path: "../GemmaKit"),
        // The version in ExecutorchEngine.swift is this one.
        .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.5.1"),
    ],
    targets: [
        .target(
            name: "GemmaExecutorch",
            dependencies: [
                .product(name: "GemmaKit", package: "GemmaKit"),
                .product(name: "executorch", package: "executorch"),
                .product(name: "backend_xnnpack", package: "executorch"),
                .product(name: "kernels_optimized", package: "executorch"),
                .product(name: "kernels_quantized", package: "executorch"),
            ])
    ]
)
