// swift-tools-version: 5.9
import Foundation
import PackageDescription

var targets: [Target] = [.target(name: "GemmaKit"), .target(name: "GemmaChat", dependencies: ["GemmaKit"])]
var tests: [Target.Dependency] = ["GemmaKit"]

// On Linux the tests run a bundle on ONNX Runtime's C library, if test.sh could fetch it.
if let folder = ProcessInfo.processInfo.environment["GEMMA_ONNXRUNTIME"] {
    let library = folder + "/native"
    targets.append(
        .target(
            name: "OnnxSession",
            path: "Tests/OnnxSession",
            cSettings: [.unsafeFlags(["-I", folder + "/headers"])],
            linkerSettings: [
                .unsafeFlags(["-L", library, "-lonnxruntime", "-Xlinker", "-rpath", "-Xlinker", library])
            ]
        ))
    tests.append("OnnxSession")
}

let package = Package(
    name: "GemmaKit",
    platforms: [.iOS("18.0"), .macOS("15.0")],
    products: [.library(name: "GemmaKit", targets: ["GemmaKit", "GemmaChat"])],
    targets: targets + [
        .testTarget(name: "GemmaKitTests", dependencies: tests),
        .testTarget(name: "GemmaChatTests", dependencies: ["GemmaChat"]),
    ]
)
