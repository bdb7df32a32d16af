# What `cmake --install` puts where: the program, the client library with its protocol, the demo model, the documents.
install(TARGETS shoal RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})

# libshoal: the job interface for C programs, without MPI and without the model. pkg-config --cflags --libs shoal.
file(GLOB LIBSHOAL_COMMON CONFIGURE_DEPENDS common/*.c)
add_library(libshoal STATIC proto/client.c proto/wire.c ${LIBSHOAL_COMMON} ${PROTO_SRCS})
set_target_properties(libshoal PROPERTIES OUTPUT_NAME shoal)
target_include_directories(libshoal SYSTEM PRIVATE ${PROTO_GEN})
target_link_libraries(libshoal PRIVATE PkgConfig::ZMQ PkgConfig::PROTOBUFC PkgConfig::JANSSON)
set_source_files_properties(${PROTO_SRCS} PROPERTIES COMPILE_OPTIONS -w)
install(TARGETS libshoal ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
set(SHOAL_INCLUDE ${CMAKE_INSTALL_INCLUDEDIR}/shoal)
install(FILES proto/client.h proto/wire.h ${PROTO_GEN}/proto/job.pb-c.h ${PROTO_GEN}/proto/group.pb-c.h
        DESTINATION ${SHOAL_INCLUDE}/proto)
install(FILES common/status.h common/buf.h DESTINATION ${SHOAL_INCLUDE}/common)
configure_file(cmake/shoal.pc.in ${CMAKE_BINARY_DIR}/shoal.pc @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/shoal.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(FILES ${PROTO_FILES} DESTINATION ${CMAKE_INSTALL_DATADIR}/shoal/proto)
install(DIRECTORY share/minnow DESTINATION ${CMAKE_INSTALL_DATADIR}/shoal)
install(FILES share/demo-batch.jsonl DESTINATION ${CMAKE_INSTALL_DATADIR}/shoal)
install(FILES README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(DIRECTORY docs/ DESTINATION ${CMAKE_INSTALL_DOCDIR} FILES_MATCHING PATTERN "*.md")
