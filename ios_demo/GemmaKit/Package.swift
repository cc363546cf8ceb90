// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "GemmaKit",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "GemmaKit", targets: ["GemmaKit"])],
    targets: [
        .target(name: "GemmaKit"),
        .testTarget(name: "GemmaKitTests", dependencies: ["GemmaKit"]),
    ]
)
